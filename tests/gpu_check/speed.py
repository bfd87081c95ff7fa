"""Seconds of forward, loss and backward in bfloat16, images a second and MFU: ours and diffusers', at several shapes.

The cells are measured in bouts. A bout is a few ways to run a net of one shape and micro batch, and ours, eager, is
always one of them. The ways take turns, round by round, and the median of the rounds counts: what the card does in the
meantime falls on all of them alike. The bouts come in the order of what they decide.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from model.config import UNetConfig
from tests.gpu_check.check import LEFT_OUT, MEASURED, PLANNED, Check, Row, missing, of_error
from tests.gpu_check.nets import (
    CONFIGURED,
    FEW_BIT,
    Images,
    Step,
    build,
    build_peer,
    compile_stages,
    compile_whole,
    images,
    shape,
)
from tests.gpu_check.plan import BF16_BYTES, card_peak, flops_per_image, largest_micro_batch, parameters

EAGER, PEER = "ours, eager", "diffusers, eager"
EXACT = "ours, eager, exact GELU"
WHOLE, STAGES = "ours, compiled", "ours, compiled by stage"
WHOLE_NHWC, WHOLE_EXACT = "ours, compiled, nhwc", "ours, compiled, exact GELU"
STAGES_NHWC, PEER_WHOLE = "ours, compiled by stage, nhwc", "diffusers, compiled"
# As many nets have weights of their own in a bout: ours and diffusers'.
NETS = 2
# Published: JAX-Toolbox's Imagen base-2B on 8 A100, images a second and GPU; a whole training step.
TO_BEAT = ("512", "to beat on an A100: 27.4 images/s, a whole step")
ROUNDS, SECONDS_A_ROUND, WARM_UPS = 3, 0.5, 2


@dataclass(frozen=True, slots=True)
class Bout:
    """Ways to run a net of a shape at a micro batch."""

    shape: str
    micro_batch: int
    ways: tuple[str, ...]

    def cell(self, way: str) -> str:
        """The name of the row."""
        return f"{self.shape}, micro batch {self.micro_batch}, {way}"


def run(check: Check) -> Iterator[Row]:
    """A row of each cell, those of a bout together at its end."""
    found: dict[str, int] = {}
    for name in check.shapes[:1] if check.tiny else check.shapes:  # tiny nets are all one
        found[name] = most(check, shape(check, name))
        text = f"largest micro batch by the plan, beside the other nets: {found[name]}"
        if name == TO_BEAT[0]:
            text += f"; {TO_BEAT[1]}"
        yield Row(name, MEASURED, text, {"largest": found[name], "configured": CONFIGURED[name]})
    flops = {name: flops_per_image(shape(check, name)) for name in found}
    todo = bouts(check, found)
    if missing("diffusers"):
        yield Row("diffusers", LEFT_OUT, "needs diffusers: ours is timed alone")
        todo = without_peer(todo)
    done: set[str] = set()
    yield from (Row(bout.cell(way), PLANNED) for bout in todo for way in bout.ways)
    for bout in todo:
        for row in fight(bout, check, flops[bout.shape]):
            if row.name not in done:  # ours, eager, is in every bout
                done.add(row.name)
                yield row
        gc.collect()
        if check.on_gpu:
            torch.cuda.empty_cache()
        torch.compiler.reset()


def most(check: Check, config: UNetConfig) -> int:
    """The largest micro batch that fits beside the nets of a bout."""
    memory = torch.cuda.get_device_properties(0).total_memory if check.on_gpu else 8e9
    beside = (NETS - 1) * BF16_BYTES * parameters(config)
    return min(largest_micro_batch(config, memory, FEW_BIT, beside), 2 if check.tiny else 10**6)


def bouts(check: Check, largest: dict[str, int]) -> list[Bout]:
    """All of them, the most telling first: at half of the largest micro batch, where every net fits."""
    if check.tiny:
        return [Bout(name, n, (EAGER, PEER, WHOLE, WHOLE_NHWC)) for name, n in largest.items()]
    half = {name: max(n // 2, 1) for name, n in largest.items()}
    found = [Bout(name, n, (EAGER, PEER, EXACT)) for name, n in half.items()]
    found += [Bout(name, n, (EAGER, WHOLE)) for name, n in half.items()]
    for way in (WHOLE_NHWC, STAGES, PEER_WHOLE, WHOLE_EXACT, STAGES_NHWC):
        found += [Bout(name, n, (EAGER, way)) for name, n in half.items()]
    others = {name: (CONFIGURED[name], n, max(n // 4, 1)) for name, n in largest.items()}
    for i in range(3):
        found += [Bout(name, ns[i], (EAGER, PEER)) for name, ns in others.items() if ns[i] != half[name]]
    for i in range(3):
        found += [Bout(name, ns[i], (EAGER, WHOLE)) for name, ns in others.items() if ns[i] != half[name]]
    return found


def without_peer(todo: list[Bout]) -> list[Bout]:
    """The bouts without diffusers' net, and without those that were for its sake alone."""
    ours = [replace(bout, ways=tuple(w for w in bout.ways if w not in (PEER, PEER_WHOLE))) for bout in todo]
    return [bout for bout in ours if len(bout.ways) > 1]


def fight(bout: Bout, check: Check, flops: float) -> Iterator[Row]:
    """Warm all ways of a bout up, time them in turn, and give the rows."""
    config = shape(check, bout.shape)
    batch = images(config, bout.micro_batch, check.device, dtype=torch.bfloat16)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    compile_seconds: dict[str, float] = {}
    ours: list[nn.Module] = []  # the net whose parameters all of ours have
    for way in bout.ways:
        began = time.perf_counter()
        try:
            step = make_step(way, config, batch, check, ours)
            for _ in range(WARM_UPS):
                step()
            wait(check)
            compile_seconds[way] = time.perf_counter() - began
            peaks[way] = peak_of(step, check)
            steps[way] = step
        except Exception as error:
            yield of_error(bout.cell(way), error)
        # What a failed way held goes only now, when its error is gone too.
        step = None  # type: ignore[assignment]
        gc.collect()
        if check.on_gpu:
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(1 if check.tiny else ROUNDS):
        for way, step in steps.items():
            times[way].append(seconds(step, check))
    medians = {way: statistics.median(values) for way, values in times.items()}
    peak = card_peak(check.device)
    for way, value in medians.items():
        rate = bout.micro_batch / value
        figures = {
            "seconds": value, "rounds": times[way], "images_per_second": rate, "flops_per_second": flops * rate,
            "mfu": flops * rate / peak if peak else None, "peak_bytes": peaks[way],
            "of_ours_eager": value / medians[EAGER] if EAGER in medians else None,
            "first_steps_seconds": compile_seconds[way],
        }  # fmt: skip
        yield Row(bout.cell(way), MEASURED, in_words(figures, check), figures)


def in_words(figures: dict, check: Check) -> str:
    """The numbers of a cell for the table."""
    mfu = f"MFU {figures['mfu']:.1%}" if figures["mfu"] else f"{figures['flops_per_second'] / 1e12:.3g} TFLOP/s"
    parts = [f"{figures['seconds']:.4g} s", f"{figures['images_per_second']:.4g} images/s", mfu]
    if figures["of_ours_eager"]:
        parts.append(f"{figures['of_ours_eager']:.3f} of ours, eager")
    if check.on_gpu:
        parts.append(f"peak {figures['peak_bytes'] / 1e9:.1f} GB")
    parts.append(f"first steps {figures['first_steps_seconds']:.0f} s")
    return ", ".join(parts) + ("" if check.on_gpu else " (of a CPU: MFU and peak memory need a GPU)")


def make_step(way: str, config: UNetConfig, batch: Images, check: Check, ours: list[nn.Module]) -> Step:
    """The way's step; all ways of ours share their parameters."""
    who, how, *more = [*way.split(", "), ""]
    if who == "diffusers":
        net: nn.Module = build_peer(config, check.device, torch.bfloat16)
        return Step(compile_whole(net, check) if how == "compiled" else net, batch)
    if not ours:
        ours.append(build(config, check.device, torch.bfloat16, FEW_BIT))
    activation = "gelu" if "exact GELU" in more else FEW_BIT
    layout = "nhwc" if "nhwc" in more else "nchw"
    net = build(config, check.device, torch.bfloat16, activation, like=ours[0], layout=layout)
    ways: dict[str, Callable] = {"compiled": compile_whole, "compiled by stage": compile_stages}
    return Step(ways[how](net, check) if how in ways else net, batch)


def seconds(step: Step, check: Check) -> float:
    """Of one step, the mean of as many as take SECONDS_A_ROUND; by the device's clock on a GPU."""
    began = time.perf_counter()
    step()
    wait(check)
    count = max(1, min(20, round(SECONDS_A_ROUND / (time.perf_counter() - began))))
    if not check.on_gpu:
        began = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - began) / count
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    step.net.zero_grad(set_to_none=True)  # the gradients of one net at a time
    return start.elapsed_time(end) / 1e3 / count


def peak_of(step: Step, check: Check) -> int:
    """The most bytes at any moment of a step, other nets of the bout left out."""
    if not check.on_gpu:
        return 0
    step.net.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    own = sum(p.nbytes for p in step.net.parameters())
    step.net.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before + own


def wait(check: Check) -> None:
    """Until the device has done all."""
    if check.on_gpu:
        torch.cuda.synchronize()
