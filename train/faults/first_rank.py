"""Work of the first rank alone: looks whose result it tells the others, and the sample grid, for which they wait."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from train.faults.preempt import RankConsensus

T = TypeVar("T")

# The others are told no more often.
TELL_SECONDS = 1.0


@contextmanager
def first_rank_works(consensus: RankConsensus, alive: Callable[[], None]) -> Iterator[Callable[[object], None]]:
    """Inside the block the first rank works, and calls after each step what it is given; the others wait at its end.

    At each step `alive` is called on all ranks, at most once in TELL_SECONDS on the others. A collective call; nobody
    waits in one for longer than a step takes.
    """
    first, told = dist.get_rank() == 0, time.monotonic()

    def after_step(_: object = None) -> None:
        nonlocal told
        alive()
        if time.monotonic() - told > TELL_SECONDS:
            consensus.any(True)
            told = time.monotonic()

    yield after_step
    alive()
    while consensus.any(False)[0] and not first:
        alive()


def of_first_rank(look: Callable[[], T]) -> T:
    """What the first rank finds, on all ranks; the others do not look. A collective call."""
    found = [look() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def raise_on_all(fault: str) -> None:
    """Tell all ranks what each has found wrong, '' for nothing; a collective call.

    Raises: ValueError with the fault of the first rank that has one, on all ranks.
    """
    faults: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    if first := next(filter(None, faults), ""):
        raise ValueError(first)
