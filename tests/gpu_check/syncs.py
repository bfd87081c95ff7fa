"""How often a micro batch makes the host wait for the device, and how often something is read back from it.

Text states of lowrank too, which must have the bits that they have on a CPU.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from data.text.lowrank import Channels, register_channels
from data.text.lowrank_factors import FACTORS
from data.text.lowrank_product import LowrankProduct
from tests.gpu_check.check import LEFT_OUT, MEASURED, Check, Row, attempt, planned, verdict
from tests.gpu_check.nets import FEW_BIT, Step, build, compile_whole, images, shape
from tests.gpu_check.trainer import ACCUMULATE, ENGINE, Spec, has_engine, make_batch, make_trainer

ROOT = Path(__file__).resolve().parents[2]
# What the profiler calls them. The last two are operators, which a CPU run has too.
COUNTED = {
    "device synchronisations": ("cudaDeviceSynchronize",),
    "stream synchronisations": ("cudaStreamSynchronize", "cudaEventSynchronize"),
    "copies to the host": ("Memcpy DtoH",),
    "copies from pageable memory": ("Memcpy HtoD (Pageable",),
    "numbers read": ("aten::_local_scalar_dense",),
    "nonzero": ("aten::nonzero",),
}
# None of these in what the project itself computes.
NONE_OF = [name for name in COUNTED if name != "copies from pageable memory"]
BATCHES = 4
# Where the project's own code lies.
OWN = ("train/", "model/", "data/", "tests/")


def run(check: Check) -> Iterator[Row]:
    """Rows of the net with its loss, eager and compiled, then of the whole step with the optimizer."""
    names = {"eager": False} if check.tiny else {"eager": False, "compiled": True}
    whole, lowrank = "whole step", "text states of lowrank"
    yield from planned([*(f"net, loss, backward, {name}" for name in names), lowrank, whole])
    for label, compiled in names.items():
        name = f"net, loss, backward, {label}"
        yield attempt(name, lambda name=name, compiled=compiled: net_row(name, check, compiled))
    yield attempt(lowrank, lambda: lowrank_row(lowrank, check))
    if not has_engine():
        yield Row("engine", LEFT_OUT, f"needs {' and '.join(ENGINE)}: torch's AdamW takes its place")
    yield attempt(whole, lambda: step_row(whole, check))


def net_row(name: str, check: Check, compiled: bool) -> Row:
    """Forward, loss and backward of batches that are on the device already: nothing may wait."""
    config = shape(check, "small")
    net = build(config, check.device, torch.bfloat16, FEW_BIT)
    if compiled:
        compile_whole(net, check)
    step = Step(net, images(config, 2, check.device, dtype=torch.bfloat16))

    def action() -> None:
        for _ in range(BATCHES):
            step()

    found, where = count(action, check, warm_up=step)
    waits = {what: found[what] for what in NONE_OF if found[what]}
    text = ", ".join(f"{what}: {n}" for what, n in waits.items()) or "no wait and no read-back"
    return verdict(
        name, not waits, f"{text}, in {BATCHES} micro batches{said(where, check)}", counts=found, where=where
    )


def lowrank_row(name: str, check: Check) -> Row:
    """The product of random factors, with sums that float32 does not hold."""
    captions, rows, tokens, dim = (8, 11, 20, 64) if check.tiny else (8, 51, 77, 4096)
    draw = np.random.default_rng(0)
    center, scale = draw.standard_normal((2, dim), np.float32), draw.random(dim, np.float32) + 0.1
    code, _ = register_channels(Channels(center, scale).to_text(), dim)
    size = FACTORS.size + rows * (4 * tokens + dim)
    head = np.frombuffer(FACTORS.pack(code, 3e-5, 5e-5, size, tokens // 2, 0), np.uint8)
    coefficients = draw.integers(-(1 << 17), 1 << 17, (captions, rows, tokens)).astype("<f4").view(np.uint8)
    numbers = draw.integers(256, size=(captions, rows, dim), dtype=np.uint8)
    body = np.concatenate([coefficients, numbers], 2).reshape(captions, -1)
    on_host = torch.from_numpy(np.concatenate([np.tile(head, (captions, 1)), body], 1))
    empty = draw.standard_normal((tokens, dim), np.float32)
    there, here = on_host.to(check.device), LowrankProduct(empty, torch.device("cpu"))
    product = LowrankProduct(empty, torch.device(check.device))
    found, where = count(lambda: product.states(there), check, warm_up=lambda: product.states(there))
    waits = {what: found[what] for what in NONE_OF if found[what]}
    equal = torch.equal(product.states(there).cpu(), here.states(on_host))
    text = ", ".join(f"{what}: {n}" for what, n in waits.items()) or "no wait and no read-back"
    bits = "the bits of the CPU" if equal else "other bits than on the CPU"
    return verdict(name, equal and not waits, f"{bits}, {text}{said(where, check)}", counts=found, where=where)


def step_row(name: str, check: Check) -> Row:
    """A step of ACCUMULATE micro batches from pinned memory, with the optimizer: counts a micro batch, and where.

    The engine waits in its check of the gradient and after the optimizer, once a step. The project's own code must not.
    """
    spec = Spec(shape(check, "small"), 2, FEW_BIT)
    trainer = make_trainer(spec, check)
    made = [make_batch(spec, i, check.on_gpu) for i in range(ACCUMULATE)]
    batches = trainer.on_device(cycle(made))

    def step() -> None:
        for _ in range(ACCUMULATE):
            trainer.micro_batch(batches)
        trainer.step()

    def action() -> None:
        for _ in range(BATCHES // ACCUMULATE):
            step()

    found, where = count(action, check, warm_up=step)
    each = ", ".join(f"{what} {n / BATCHES:g}" for what, n in found.items() if n) or "nothing"
    text = f"{trainer.name}, {ACCUMULATE} micro batches a step; a micro batch: {each}{said(where, check)}"
    figures = {"micro_batches": BATCHES, "counts": found, "where": where}
    if not check.on_gpu:
        return Row(name, MEASURED, text, figures)
    return verdict(name, not any(line.startswith(OWN) for line in where), text, **figures)


def said(where: dict[str, int], check: Check) -> str:
    """The lines of code that torch blames, the most frequent first; on a CPU, that the device's counts are missing."""
    if not check.on_gpu:
        return " (waits and copies need a GPU; what a CPU shows is the numbers read)"
    lines = sorted(where, key=lambda line: -where[line])
    return f"; at {', '.join(lines[:6])}" if lines else ""


def count(
    action: Callable[[], None], check: Check, warm_up: Callable[[], None]
) -> tuple[dict[str, int], dict[str, int]]:
    """COUNTED while action() runs, and how often torch warned of a wait at which line of code."""
    for _ in range(2):
        warm_up()
    where: dict[str, int] = {}
    if check.on_gpu:
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                action()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "called a synchronizing" in str(warning.message):
                line = f"{short(warning.filename)}:{warning.lineno}"
                where[line] = where.get(line, 0) + 1
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_gpu else [])]
    with profile(activities=activities) as profiled, record_function("counted"):
        action()
    events = profiled.events()
    window = next(
        event.time_range for event in events if event.name == "counted" and event.device_type == DeviceType.CPU
    )
    found = dict.fromkeys(COUNTED, 0)
    for event in events:
        for what, names in COUNTED.items():
            # The profiler itself waits for the device at its end. Copies run after the host has asked for them.
            inside = event.name.startswith("Memcpy") or window.start <= event.time_range.start <= window.end
            if inside and event.name.startswith(names):
                found[what] += 1
    return found, where


def short(path: str) -> str:
    """A file of the project by its path there, one of a package by the end of its path."""
    parts = Path(path).parts
    return str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else "/".join(parts[-3:])
