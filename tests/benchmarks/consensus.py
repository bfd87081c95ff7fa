"""What it costs that the ranks ask one another in each step: `python -m tests.benchmarks.consensus`.

A step is a sleep, as the host's part of a step on a GPU is. Ranks ask at its end and wait for the answer, or ask at its
start and read the answer at its end (train/faults/preempt.py). What a step takes beyond its sleep, in turns, medians.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from data.cli import command
from train.faults.preempt import RankConsensus


@dataclass
class Consensus:
    """Measures what it costs that the ranks ask one another.

    ranks: how many of them.
    steps: of a turn.
    rounds: turns of each way.
    milliseconds: that a step sleeps.
    """

    ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32])
    steps: int = 20
    rounds: int = 5
    milliseconds: float = 100.0


def at_the_end(consensus: RankConsensus, sleep: float) -> None:
    """A step that ends with the question."""
    time.sleep(sleep)
    consensus.ask(False, False, False)()


def during_the_step(consensus: RankConsensus, sleep: float) -> None:
    """A step that begins with the question."""
    answer = consensus.ask(False, False, False)
    time.sleep(sleep)
    answer()


def nothing(consensus: RankConsensus, sleep: float) -> None:
    """A step without a question: what the machine itself adds to the sleep."""
    time.sleep(sleep)


WAYS: tuple[Callable[[RankConsensus, float], None], ...] = (nothing, at_the_end, during_the_step)


def rank_of_many(rank: int, ranks: int, args: Consensus, folder: str) -> None:
    """One rank; the first writes milliseconds a step beyond the sleep, a line for each turn, a column for each way."""
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=ranks)
    consensus, sleep, turns = RankConsensus(), args.milliseconds / 1000, []
    for _ in range(args.rounds):
        turn = []
        for way in WAYS:
            way(consensus, sleep)
            dist.barrier()
            began = time.perf_counter()
            for _ in range(args.steps):
                way(consensus, sleep)
            turn.append(1000 * ((time.perf_counter() - began) / args.steps - sleep))
            dist.barrier()
        turns.append(turn)
    if rank == 0:
        Path(folder, "turns").write_text("\n".join(" ".join(map(str, turn)) for turn in turns))
    dist.barrier()
    dist.destroy_process_group()


def measure(args: Consensus) -> None:
    """Print a table."""
    print("| ranks | no question, ms | at the end, ms | during the step, ms |\n|---:|---:|---:|---:|")
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(rank_of_many, (ranks, args, folder), ranks, start_method="fork")
            turns = [list(map(float, line.split())) for line in Path(folder, "turns").read_text().splitlines()]
        medians = [statistics.median(column) for column in zip(*turns, strict=True)]
        print(f"| {ranks} | {' | '.join(f'{value:.2f}' for value in medians)} |", flush=True)


def main(argv: list[str] | None = None) -> None:
    command(measure, Consensus, argv)


if __name__ == "__main__":
    main()
