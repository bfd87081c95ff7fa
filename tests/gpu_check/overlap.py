"""The share of the gradients' bytes that are ready when 25, 50, 75 and 90 % of the backward's time have passed.

What is ready early can be all-reduced while the backward still runs.
"""

import time
from collections.abc import Callable, Iterator

import torch

from model.unet import UNet
from tests.gpu_check.check import MEASURED, Check, Row, attempt, planned, verdict
from tests.gpu_check.nets import FEW_BIT, Step, build, compile_stages, compile_whole, images, shape

MOMENTS = (0.25, 0.5, 0.75, 0.9)
# Compiled stage by stage half of the bytes must be ready by then.
HALF_BY = 0.8


def run(check: Check) -> Iterator[Row]:
    """Rows of the eager net, of the net compiled stage by stage, and of the net compiled whole."""
    ways: dict[str, Callable[[UNet, Check], UNet]] = {
        "eager": lambda net, check: net,
        "compiled stage by stage": compile_stages,
        "compiled whole": compile_whole,
    }
    yield from planned(ways)
    config = shape(check, "M")
    for name, way in ways.items():
        yield attempt(name, lambda name=name, way=way: row(name, way(make(config, check), check), check))
        torch.compiler.reset()


def make(config, check: Check) -> UNet:
    """M with the few-bit GELU in bfloat16."""
    return build(config, check.device, torch.bfloat16, FEW_BIT)


def row(name: str, net: UNet, check: Check) -> Row:
    """The shares, in the median of a few backwards."""
    step = Step(net, images(net.config, 2 if check.tiny else 16, check.device))
    for _ in range(3):
        step()
    tries = [ready(step, check) for _ in range(1 if check.tiny else 5)]
    tries.sort(key=lambda times: share(times, 0.5))
    times = tries[len(tries) // 2]
    shares = {f"{moment:.0%}": share(times, moment) for moment in MOMENTS}
    half = share(times, HALF_BY)
    said = ", ".join(f"{value:.0%} by {moment}" for moment, value in shares.items())
    text = f"M, bfloat16, a backward of {times[-1][0] * 1e3:.3g} ms: {said} of its time; {half:.0%} by {HALF_BY:.0%}"
    figures = {"shares": shares, f"{HALF_BY:.0%}": half, "backward_seconds": times[-1][0]}
    if not check.on_gpu or name != "compiled stage by stage":
        text += "" if check.on_gpu else " (of the CPU's time: the device's needs a GPU)"
        return Row(name, MEASURED, text, figures)
    return verdict(name, half >= 0.5, text, **figures)


def ready(step: Step, check: Check) -> list[tuple[float, int]]:
    """Seconds after the backward's start at which each gradient was ready, and its bytes; last the backward's end."""
    marks: list[tuple[object, int]] = []

    def now() -> object:
        if not check.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def hook(parameter: torch.Tensor) -> None:
        marks.append((now(), parameter.nbytes))

    parameters = [p for p in step.net.parameters() if p.requires_grad]
    handles = [p.register_post_accumulate_grad_hook(hook) for p in parameters]
    step.net.zero_grad(set_to_none=True)
    loss = step.loss()
    if check.on_gpu:
        torch.cuda.synchronize()  # so that the device runs no later than the host: at the start both are there
    start = now()
    loss.backward()
    end = now()
    if check.on_gpu:
        torch.cuda.synchronize()
    for handle in handles:
        handle.remove()
    if len(marks) != len(parameters):
        raise ValueError(f"{len(marks)} of {len(parameters)} gradients were announced")

    def seconds(mark) -> float:
        return start.elapsed_time(mark) / 1e3 if check.on_gpu else mark - start  # type: ignore[attr-defined, operator]

    return [(seconds(mark), size) for mark, size in marks] + [(seconds(end), 0)]


def share(times: list[tuple[float, int]], moment: float) -> float:
    """Of all bytes, those ready when this share of the time had passed."""
    end = times[-1][0]
    return sum(size for at, size in times if at <= moment * end) / sum(size for _, size in times)
