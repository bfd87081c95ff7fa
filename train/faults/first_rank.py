"""Work of the first rank alone: looks whose result it tells the others, and the sample grid, for which they wait."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from data.cli import reason
from train.faults.preempt import RankConsensus
from train.faults.watchdog import Watchdog

T = TypeVar("T")

# The others are told no more often.
TELL_SECONDS = 1.0


@contextmanager
def others_wait(consensus: RankConsensus, watchdog: Watchdog) -> Iterator[Callable[[object], None]]:
    """Inside the block the first rank works, and calls after each step what it is given; the others wait at its end.

    A step resets the watchdogs of all ranks, those of the others at most once in TELL_SECONDS. A collective call, in
    which nobody waits for longer than a step takes.
    """
    first, told = dist.get_rank() == 0, time.monotonic()

    def alive(_: object = None) -> None:
        nonlocal told
        watchdog.reset()
        if time.monotonic() - told > TELL_SECONDS:
            consensus.ask(True)()
            told = time.monotonic()

    yield alive
    watchdog.reset()
    while consensus.ask(False)()[0] and not first:
        watchdog.reset()


def of_first_rank(look: Callable[[], T]) -> T:
    """What the first rank finds, on all ranks; the others do not look. A collective call."""
    found = [look() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def checked_by_first_rank(look: Callable[[], T]) -> T:
    """of_first_rank, where all ranks raise what the first one finds wrong.

    Raises: ValueError for a ValueError or OSError of the first rank.
    """

    def attempt() -> tuple[T | None, str]:
        try:
            return look(), ""
        except (ValueError, OSError) as error:
            return None, reason(error) or type(error).__name__

    found, fault = of_first_rank(attempt)
    if fault:
        raise ValueError(fault)
    return found  # type: ignore[return-value]


def raise_on_all(fault: str) -> None:
    """Tell all ranks what each has found wrong, '' for nothing; a collective call.

    Raises: ValueError with the fault of the first rank that has one, on all ranks.
    """
    faults: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    if first := next(filter(None, faults), ""):
        raise ValueError(first)
