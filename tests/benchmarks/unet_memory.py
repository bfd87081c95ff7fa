"""Bytes that autograd keeps of one image between forward and backward, without parameters: a table in Markdown.

python -m tests.benchmarks.unet_memory sizes=34M,M,XL. Fake tensors have sizes and no contents, so any net fits.
"""

from dataclasses import dataclass, field

import torch
from torch._subclasses import FakeTensorMode

from data.cli import command
from tests.benchmarks.nets import DIFFUSERS, ORIGINAL, OURS, build, inputs, size
from train.monitor.step_memory import kept_bytes


def per_image(name: str, size_name: str, dtype: torch.dtype) -> float:
    """Bytes kept for one image, the mean over a batch of 4."""
    config, batch = size(size_name), 4
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            net, args = build(name, config), inputs(config, batch)
            return kept_bytes(lambda: net(*args)) / batch
    finally:
        torch.set_default_dtype(before)


@dataclass
class UNetMemory:
    """Counts the bytes that autograd keeps of one image, in fp32 and bf16.

    sizes: of the nets, of 34M, M, L and XL.
    """

    sizes: list[str] = field(default_factory=lambda: ["34M", "M", "XL"])


def measure(args: UNetMemory) -> None:
    """Print a table for each size and precision."""
    for size_name in args.sizes:
        for dtype in (torch.float32, torch.bfloat16):
            rows = [(name, per_image(name, size_name, dtype)) for name in (ORIGINAL, DIFFUSERS, *OURS)]
            peer = dict(rows)[DIFFUSERS]
            print(
                f"\n| {size_name}, {str(dtype).removeprefix('torch.')} | MB an image | of diffusers' |\n|---|---:|---:|"
            )
            for name, kept in rows:
                print(f"| {name} | {kept / 1e6:,.1f} | {kept / peer:.3f} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, UNetMemory, argv)


if __name__ == "__main__":
    main()
