"""Forward and backward of M, L and XL on a GPU, in bfloat16; skipped where there is none.

python -m tests.benchmarks.gpu [sizes=M,L,XL steps=10] prints images a second, MFU and peak memory. A row is one net,
fed micro batches of the experiment; no optimizer. MFU takes the FLOP without recomputation, and the card's dense peak.
"""

import time
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn

from data.cli import command
from tests.benchmarks.nets import DIFFUSERS, OURS, build, inputs, size
from tests.benchmarks.unet_memory import per_image
from tests.benchmarks.unet_speed import step
from train.monitor.flops import peak_flops, training_flops

MICRO_BATCH = {"34M": 2, "M": 24, "L": 8, "XL": 6}  # as conf/experiment has them; 34M is for trying this out


@dataclass
class GPU:
    """Times ours, eager and compiled, and diffusers' net on a GPU.

    sizes: of the nets, of 34M, M, L and XL.
    steps: that are timed.
    device: cuda, or cpu to try this out.
    """

    sizes: list[str] = field(default_factory=lambda: ["M", "L", "XL"])
    steps: int = 10
    device: str = "cuda"


def measure(net: nn.Module, args: tuple[torch.Tensor, ...], steps: int) -> tuple[float, float]:
    """Seconds a step and peak bytes; the first steps, in which kernels are chosen and compiled, are not counted."""
    on_gpu = args[0].is_cuda
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(3):
        step(net, args)
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(steps):
        step(net, args)
    wait()
    return (time.perf_counter() - started) / steps, float(torch.cuda.max_memory_allocated()) if on_gpu else 0.0


def time_all(args: GPU) -> None:
    """Print a table for each size."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no GPU that torch can use on this machine (torch.cuda.is_available() is false)")
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    peak = peak_flops(torch.device(args.device))
    torch.set_default_dtype(torch.bfloat16)
    for size_name in args.sizes:
        config, batch = size(size_name), MICRO_BATCH[size_name]
        flops = training_flops(config, tokens=77).total
        print(f"\n{name}, torch {torch.__version__}, {size_name}, micro batch {batch}, bfloat16\n")
        print("| net | images/s | MFU | peak memory, GB | activations an image, MB |\n|---|---:|---:|---:|---:|")
        for net_name, compiled in product((DIFFUSERS, *OURS), (False, True)):
            try:
                with torch.device(args.device):
                    net = build(net_name, config)
                    given = inputs(config, batch, args.device)
                if compiled:
                    net.compile(fullgraph=net_name != DIFFUSERS, dynamic=False)
                seconds, peak_bytes = measure(net, given, args.steps)
                rate = flops * batch / seconds
                mfu = f"{rate / peak:.1%}" if peak else f"{rate / 1e12:.1f} TFLOP/s"
                figures = f"{batch / seconds:,.1f} | {mfu} | {peak_bytes / 1e9:.1f}"
            except torch.OutOfMemoryError:
                figures = "out of memory | | "
            net = given = None  # type: ignore[assignment]  # before the next is built
            if args.device == "cuda":
                torch.cuda.empty_cache()
            kept = per_image(net_name, size_name, torch.bfloat16)
            print(f"| {net_name}{', compiled' if compiled else ''} | {figures} | {kept / 1e6:,.0f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(time_all, GPU, argv)


if __name__ == "__main__":
    main()
