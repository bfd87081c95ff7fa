"""Work of the first rank alone, for which the others wait without being taken for ranks that hang."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from train.faults.preempt import RankConsensus

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
