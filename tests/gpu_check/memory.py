"""The most memory that a training step takes, against the bytes of the plan (launch/cost), which must be within 5 %."""

import gc
from collections.abc import Iterator
from itertools import cycle

import torch

from tests.gpu_check.check import LEFT_OUT, Check, Row, attempt, needs_gpu, planned, verdict
from tests.gpu_check.nets import CONFIGURED, FEW_BIT, RECOMPUTE, Step, build, images, shape
from tests.gpu_check.plan import BF16_BYTES, net_bytes, parameters, training_bytes
from tests.gpu_check.trainer import ACCUMULATE, ENGINE, Spec, has_engine, make_batch, make_trainer

WITHIN = 0.05
# The net, what is kept for backward; the micro batch is that of conf/experiment.
CASES = [("M", mode) for mode in RECOMPUTE] + [("L", RECOMPUTE[0])]


def run(check: Check) -> Iterator[Row]:
    """Rows of forward and backward, which need torch alone, then of whole steps with the engine."""
    cases = CASES[:2] if check.tiny else CASES
    kinds = {"forward and backward": net_row, "training step": training_row}
    names = {f"{kind}, {size}, {mode}": (kind, size, mode) for kind in kinds for size, mode in cases}
    yield from planned(names)
    for name, (kind, size, mode) in names.items():
        if kind == "training step" and not check.on_gpu:
            yield needs_gpu(name, "the allocator's own count")
        elif kind == "training step" and not has_engine():
            yield Row(name, LEFT_OUT, f"needs {' and '.join(ENGINE)}")
        else:
            yield attempt(name, lambda name=name, row=kinds[kind], args=(size, mode): row(name, check, *args))
        gc.collect()


def net_row(name: str, check: Check, size: str, mode: str) -> Row:
    """Weights, and the most that forward and backward take beside them."""
    config, micro_batch = shape(check, size), 2 if check.tiny else CONFIGURED[size]
    plan = BF16_BYTES * parameters(config) + net_bytes(config, micro_batch, FEW_BIT, mode).peak
    batch = images(config, micro_batch, check.device)
    before = start_count(check)
    net = build(config, check.device, torch.bfloat16, FEW_BIT, mode)
    if check.on_gpu:
        step = Step(net, batch)
        for _ in range(2):
            step()
        net.zero_grad(set_to_none=True)  # a step starts without gradients
        torch.cuda.reset_peak_memory_stats()
        step()
        measured = torch.cuda.max_memory_allocated() - before
    else:
        from train.monitor.step_memory import walk_bytes  # counts storages as they come and go, of real tensors too

        measured = (
            BF16_BYTES * parameters(config)
            + walk_bytes(net, (batch.noise, batch.t, batch.text_emb, *batch.low_res)).peak
        )
    return against_plan(name, measured, plan, f"micro batch {micro_batch}")


def training_row(name: str, check: Check, size: str, mode: str) -> Row:
    """Steps of the project's engine on one rank, which holds all masters and moments."""
    config, micro_batch = shape(check, size), CONFIGURED[size]
    plan = training_bytes(config, micro_batch, FEW_BIT, mode)
    before = start_count(check)
    spec = Spec(config, micro_batch, FEW_BIT, mode)
    trainer = make_trainer(spec, check)
    batches = trainer.on_device(cycle([make_batch(spec, i, pin=True) for i in range(ACCUMULATE)]))
    for count in range(3):  # the first makes the moments
        if count == 2:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(ACCUMULATE):
            trainer.micro_batch(batches)
        trainer.step()
    measured = torch.cuda.max_memory_allocated() - before
    return against_plan(name, measured, plan, f"{trainer.name}, micro batch {micro_batch}")


def start_count(check: Check) -> int:
    """Free what earlier rows left; the bytes that stay."""
    gc.collect()
    if not check.on_gpu:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def against_plan(name: str, measured: float, plan: float, what: str) -> Row:
    """The row of two numbers of bytes."""
    off = measured / plan - 1
    text = f"{what}: {measured / 1e9:.3g} GB measured, {plan / 1e9:.3g} GB planned, {off:+.1%}"
    return verdict(name, abs(off) <= WITHIN, text, measured=measured, planned=plan)
