"""Forward and backward of ours, diffusers' and the original net: the same weights and batch, round by round in turn.

python -m tests.benchmarks.unet_speed [size=34M batch=4 rounds=9 compiled=false]. Prints Markdown: medians, ratios, the
share of the machine's own matmul rate, and where the time of each net goes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data.cli import command
from model.unet import UNet
from tests.benchmarks.nets import DIFFUSERS, ORIGINAL, OURS, build, inputs, size

# The autograd nodes and operators of a profile, by what they do.
KINDS = {
    "convolution": ("convolution",),
    "attention": ("scaled_dot_product", "softmax"),
    "matmul": ("mm", "linear"),
    "GELU": ("gelu", "bitwise", "gt", "abs", "index_select", "pad", "shift", "FewBit"),
    "norm": ("norm",),
    "copies": ("copy", "cat", "clone", "slice", "contiguous", "fill", "zero", "empty", "_to_copy"),
    "adds, products": ("add", "mul", "sum", "div", "mean", "sub"),
}


EXACT = next(iter(OURS))


@dataclass
class Speed:
    """Times the nets of one size against each other.

    size: 34M, M, L or XL.
    batch: images of a step.
    rounds: turns of each.
    compiled: compare diffusers' net and ours, eager and by torch.compile, instead; compiling takes minutes.
    """

    size: str = "34M"
    batch: int = 4
    rounds: int = 9
    compiled: bool = False


def step(net: nn.Module, args: tuple[Tensor, ...]) -> None:
    """One forward and backward."""
    net.zero_grad(set_to_none=True)
    net(*args).square().mean().backward()


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def matmul_rate(side: int = 2048) -> float:
    """FLOP per second of a square float32 matmul, the best of a few."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(8))


def shares(net: nn.Module, args: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of a step spent in each of KINDS, and elsewhere (Python and autograd among it)."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(net, args)
    found = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        kind = next((k for k, words in KINDS.items() if any(word in event.key for word in words)), "other")
        found[kind] += event.self_cpu_time_total / 1e6
    return found


def compiled(net: nn.Module) -> nn.Module:
    """The net compiled as it is in a training: ours stage by stage, diffusers' as a whole."""
    if isinstance(net, UNet):
        net.compile_stages()
        return net
    return torch.compile(net, dynamic=False)  # type: ignore[return-value]


def measure(args: Speed) -> None:
    """Print both tables."""
    torch.manual_seed(0)
    config = size(args.size)
    names = [DIFFUSERS, EXACT] if args.compiled else [ORIGINAL, DIFFUSERS, *OURS]
    weights = {k: torch.randn_like(v) * 0.02 for k, v in build(EXACT, config).state_dict().items()}
    nets, batch = {name: build(name, config, weights) for name in names}, inputs(config, args.batch)
    with FlopCounterMode(display=False) as flops:
        step(nets[EXACT], batch)
    if args.compiled:
        for name in (DIFFUSERS, EXACT):
            nets[f"{name}, compiled"] = compiled(build(name, config, weights))
    expected = nets[DIFFUSERS](*batch).detach()
    for name, net in nets.items():
        torch.testing.assert_close(net(*batch).detach(), expected, rtol=1e-3, atol=1e-5, msg=name)
    names = list(nets)
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for _ in range(args.rounds + 1):
        rates.append(matmul_rate())
        for name, net in nets.items():
            times[name].append(seconds(lambda net=net: step(net, batch)))  # type: ignore[misc]
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up

    rate = statistics.median(rates)
    print(f"{args.size}, batch {args.batch}, fp32, {torch.get_num_threads()} threads, {args.rounds} rounds; ", end="")
    print(f"matmul of this machine {rate / 1e9:.0f} GFLOP/s\n")
    print("| net | s a step, median | of diffusers' | smallest, largest ratio of a round | of the matmul rate |")
    print("|---|---:|---:|---:|---:|")
    for name in names:
        ratios = [a / b for a, b in zip(times[name][1:], times[DIFFUSERS][1:], strict=True)]
        share = flops.get_total_flops() / medians[name] / rate
        print(
            f"| {name} | {medians[name]:.2f} | {statistics.median(ratios):.3f} | {min(ratios):.2f}, {max(ratios):.2f} "
            f"| {share:.0%} |"
        )
    if args.compiled:
        return
    print(f"\n| ms a step | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    profiles = [shares(net, batch) for net in nets.values()]
    for kind in profiles[0]:
        print(f"| {kind} | {' | '.join(f'{p[kind] * 1e3:,.0f}' for p in profiles)} |")


def main(argv: list[str] | None = None) -> None:
    command(measure, Speed, argv)


if __name__ == "__main__":
    main()
