"""What it costs to judge each step for a spike: `python -m tests.benchmarks.spike_cost`.

Counts what a step sends and launches. Then steps of several ranks with and without it, in turns; a step is a sleep, as
the host's part of a step on a GPU is, between the two all-reduces that ranks have anyway: of gradients, and of signals.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from data.cli import command
from train.faults.preempt import RankConsensus
from train.faults.spikes import SpikeMemory, Spikes

# Of the gradient that ranks sum in a step.
GRADIENT = 1_000_000
# Operations that write nothing: they look at memory that is there, or make none.
VIEWS = ("detach", "view", "_unsafe_view", "unbind", "select", "alias", "empty", "is_pinned")


@dataclass
class SpikeCost:
    """Measures what it costs to judge each step for a spike.

    ranks: how many of them.
    pairs: of a step with and one without.
    milliseconds: that a step sleeps.
    micro_batches: of a rank in a step.
    samples: of a micro batch.
    """

    ranks: list[int] = field(default_factory=lambda: [2, 3])
    pairs: int = 200
    milliseconds: float = 20.0
    micro_batches: int = 2
    samples: int = 6


class Operations(TorchDispatchMode):
    """Counts the operations of torch inside the block; on a GPU each is a kernel or a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name not in VIEWS:
            self.names[name] += 1
        return operation(*args, **(kwargs or {}))


class Alone:
    """One rank's consensus, which notes what it is to send."""

    sent: ClassVar[list[torch.Tensor]] = []

    def mean(self, values: torch.Tensor) -> Callable[[], list[float]]:
        self.sent.append(values)
        return values.tolist


def errors_of(args: SpikeCost, step: int) -> list[tuple[int, torch.Tensor]]:
    """The mse of a step's micro batches."""
    return [(step * args.micro_batches + i, torch.rand(args.samples)) for i in range(args.micro_batches)]


def count(args: SpikeCost) -> None:
    """Print what one step sends and launches."""
    alone = Alone()
    spikes = Spikes(20.0, SpikeMemory(), alone)
    for step in range(10):
        errors, norm, operations = errors_of(args, step), torch.rand(()), Operations()
        with operations:
            spikes.add(step, errors, norm)
        spikes.judge()
    named = ", ".join(f"{name} {number}" for name, number in sorted(operations.names.items()))
    print(f"a step launches {operations.names.total()} operations on the device ({named})")
    sent = alone.sent[-1]
    print(f"and sends {sent.numel()} numbers of {sent.element_size()} bytes from the device to the host, and over gloo")


def rank_of_some(rank: int, ranks: int, args: SpikeCost, folder: str) -> None:
    """One rank; the first writes a line for each pair: ms of a step without and with, and of its processor."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=ranks)
    consensus, gradient = RankConsensus(), torch.zeros(GRADIENT)
    spikes, lines = Spikes(20.0, SpikeMemory(), consensus), []

    def step(number: int, judged: bool) -> tuple[float, float]:
        errors, norm = errors_of(args, number), torch.rand(())
        began, used = time.perf_counter(), time.process_time()
        answer = consensus.ask(False, False, False)
        time.sleep(args.milliseconds / 1000)
        dist.all_reduce(gradient)
        if judged:
            spikes.add(number, errors, norm)
            spikes.judge()
        answer()
        return 1000 * (time.perf_counter() - began), 1000 * (time.process_time() - used)

    for number in range(args.pairs):
        first = bool(number % 2)
        one, other = step(number, first), step(number, not first)
        without, judged = (other, one) if first else (one, other)
        lines.append(" ".join(map(str, (*without, *judged))))
    if rank == 0:
        Path(folder, "pairs").write_text("\n".join(lines))
    dist.barrier()
    dist.destroy_process_group()


def measure(args: SpikeCost) -> None:
    """Print the count, and a table."""
    count(args)
    print(
        "| ranks | a step without, ms | with - without: median, 5th to 95th of 100 pairs | of the processor, likewise |"
    )
    print("|---:|---:|---:|---:|")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(rank_of_some, (ranks, args, folder), ranks, start_method="fork")
            pairs = [list(map(float, line.split())) for line in Path(folder, "pairs").read_text().splitlines()]
        cells = [f"{statistics.median(pair[0] for pair in pairs):.1f}"]
        for unit in range(2):
            more = sorted(pair[2 + unit] - pair[unit] for pair in pairs)
            low, high = more[len(more) // 20], more[-1 - len(more) // 20]
            cells.append(f"{statistics.median(more):+.2f}, {low:+.2f} to {high:+.2f}")
        print(f"| {ranks} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, SpikeCost, argv)


if __name__ == "__main__":
    main()
