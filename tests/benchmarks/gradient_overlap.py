"""The share of the gradients' bytes that the engine hands over to the all-reduce while the backward goes on.

python -m tests.benchmarks.gradient_overlap [size=34M]. One rank of the real engine, eager, compiled stage by stage and
compiled as a whole; time is that of the processor, on one thread. Prints a table in Markdown.
"""

import os
import statistics
from dataclasses import dataclass, field, replace

import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters

from data.checks import check_choice
from data.cli import command
from data.config import DataConfig
from model.unet import UNet
from tests.benchmarks.nets import FEW_BIT, size
from tests.support.handed_over import handed_over
from train.config import Config, OptimConfig
from train.engine import build_engine, init_distributed
from train.monitor.step_memory import inputs

MOMENTS = (0.25, 0.5, 0.6, 0.75, 0.8, 0.9, 0.95)
WAYS = ("eager", "stages", "whole")


@dataclass
class GradientOverlap:
    """Measures when gradients are handed over, and how long compiling takes.

    size: 34M, M, L or XL.
    ways: of eager, stages and whole.
    recompute: what backward computes again.
    precision: bf16 or fp32.
    batch: images of a micro batch.
    rounds: backwards, of which the medians are printed.
    """

    size: str = "34M"
    ways: list[str] = field(default_factory=lambda: list(WAYS))
    recompute: str = "none"
    precision: str = "fp32"
    batch: int = 1
    rounds: int = 5


def measure(args: GradientOverlap) -> None:
    """Print a row for each way."""
    for way in args.ways:
        check_choice("ways", way, WAYS)
    init_distributed()
    torch.set_num_threads(1)
    inductor.force_disable_caches = True
    inductor.compile_threads = 1  # so that the compiler is a child of this process, whose time is counted
    print("| net | " + " | ".join(f"{moment:.0%}" for moment in MOMENTS) + " | all-reduces | graphs | s to compile |")
    print("|---" * (len(MOMENTS) + 4) + "|", flush=True)
    for way in args.ways:
        print(row(args, way), flush=True)
        torch.compiler.reset()


def row(args: GradientOverlap, way: str) -> str:
    """The shares of one way."""
    config = Config(
        model=replace(size(args.size), activation=FEW_BIT), recompute=args.recompute, precision=args.precision,
        global_batch=args.batch, micro_batch=args.batch, optim=OptimConfig("adamw"),
        data=DataConfig(streams=1),
    )  # fmt: skip
    unet = UNet(config.model, config.recompute)
    if way == "stages":
        unet.compile_stages()
    elif way == "whole":
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
    engine = build_engine(unet, config, ranks=1)
    counters.clear()

    records, seconds = [], []
    for _ in range(args.rounds + 1):
        before = processor_seconds()
        loss = engine(*inputs(config.model, args.batch, config.data.tokens or 77)).float().square().mean()
        records.append(handed_over(engine, loss))
        seconds.append(processor_seconds() - before)
        engine.step()
    engine.engine.destroy()
    shares = [statistics.median(record.share(moment) for record in records[1:]) for moment in MOMENTS]
    compiling = seconds[0] - statistics.median(seconds[1:]) if way != "eager" else 0.0
    cells = [*(f"{share:.0%}" for share in shares), str(len(records[-1].buckets))]
    return f"| {way} | {' | '.join(cells)} | {counters['stats']['unique_graphs']} | {compiling:.0f} |"


def processor_seconds() -> float:
    """Processor time of this process and its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(argv: list[str] | None = None) -> None:
    command(measure, GradientOverlap, argv)


if __name__ == "__main__":
    main()
