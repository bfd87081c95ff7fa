"""Loader processes that write their batches into memory shared with the trainer, and are replaced when they die."""

import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.loader.batch import Batch

logger = logging.getLogger(__name__)

# A message costs worker and trainer 0.1 to 0.3 ms, so it tells of at least so many samples.
SAMPLES_PER_MESSAGE = 32
# Messages that a worker is ahead of the trainer; places for one more let it go on while the last is copied out.
PREFETCH = 2
# A worker that was killed is replaced. If no batch came since so many deaths, the cause won't go away.
MOST_DEATHS = 3
# Every so many seconds without a batch it is looked whether all live. After the longer time the run ends, while it can
# still say why: other ranks give up on this one after ten minutes.
LOOK_EVERY, LONGEST_WAIT = 1.0, 540.0


class LoaderDied(RuntimeError):
    """The worker processes die again and again at the same place, or hang."""


# Fills the given places, one after the other and over again, with the batches numbered first, first + stride, ...
Fill = Callable[[int, int, list[Batch]], Iterator[Batch]]
# The place and the bad samples of each batch that a worker has made since the last message.
Message = list[tuple[int, list[tuple[str, str]]]]


class Workers:
    """The batches from a number on, in order and without end.

    fill: runs in the workers.  place: makes one shared batch.  describe: says where a batch comes from.
    Next raises: LoaderDied, or what a worker raised.
    """

    def __init__(
        self, fill: Fill, place: Callable[[], Batch], describe: Callable[[int], str], first: int, workers: int,
        pin_memory: bool,
    ) -> None:  # fmt: skip
        self._fill, self._place, self._describe = fill, place, describe
        self._next, self._workers, self._pin_memory = first, workers, pin_memory
        self._deaths = 0
        self._start()

    def __iter__(self) -> "Workers":
        return self

    def __next__(self) -> Batch:
        while True:
            round_, worker = divmod(self._next - self._first, self._workers)
            told = round_ % self._together
            if told or self._ask(worker):
                break
        place, bad = self._told[worker][told]
        batch = self._places[worker][place].copy(self._pin_memory)
        batch.bad = bad
        self._next, self._deaths = self._next + 1, 0
        return batch

    def _ask(self, worker: int) -> bool:
        """Take a worker's next message; False if all had to be started anew instead."""
        asked = time.monotonic()
        while True:
            try:
                self._told[worker] = next(self._made)
                return True
            except Exception as error:
                if self._replace_or_raise(error, time.monotonic() - asked):
                    return False

    def _start(self) -> None:
        self._first = self._next
        self._told: list[Message] = [[] for _ in range(self._workers)]
        self._places = [[self._place()] for _ in range(self._workers)]
        self._together = -(-SAMPLES_PER_MESSAGE // len(self._places[0][0].visit))
        for places in self._places:
            places += [self._place() for _ in range((PREFETCH + 1) * self._together - 1)]
        work = _Work(self._fill, self._next, self._places, self._together)
        # Its own generator: starting anew must not draw from the trainer's.
        loader = DataLoader(
            work, batch_size=None, num_workers=self._workers, prefetch_factor=PREFETCH,
            timeout=LOOK_EVERY, multiprocessing_context="fork", generator=torch.Generator(),
        )  # fmt: skip
        on_child = signal.getsignal(signal.SIGCHLD)
        self._made = iter(loader)
        # A private name, but active_children() no longer knows one that died at once.
        self._processes = list(self._made._workers)  # type: ignore[attr-defined]
        if threading.current_thread() is threading.main_thread():
            # DataLoader's handler would raise wherever the trainer stands when a worker dies; the next batch tells too.
            signal.signal(signal.SIGCHLD, on_child)

    def _replace_or_raise(self, error: Exception, waited: float) -> bool:
        """Start all workers anew if one has died; else raise the error, unless it only says that no batch came yet."""
        no_batch_yet = str(error).startswith("DataLoader timed out")
        # The connections of a killed process break a moment before it counts as ended.
        wait([process.sentinel for process in self._processes], timeout=0 if no_batch_yet else 1)
        died = [f"pid {p.pid} {_cause(p.exitcode)}" for p in self._processes if p.exitcode is not None]
        if not died and no_batch_yet and waited < LONGEST_WAIT:
            return False
        where = f"before micro batch {self._next} ({self._describe(self._next)})"
        for process in self._processes if died or no_batch_yet else ():
            process.kill()
        if not died and no_batch_yet:
            raise LoaderDied(
                f"no loader worker made a batch for {waited:.0f} s {where}: does the storage hang?"
            ) from None
        if not died:
            raise error
        self._deaths += 1
        if self._deaths == MOST_DEATHS:
            raise LoaderDied(
                f"loader worker {', '.join(died)} {where}, {MOST_DEATHS} times in a row: if the machine ran out of "
                "memory, lower data.shuffle_block or data.workers; if not, look at these shards"
            ) from None
        logger.warning("loader worker %s %s; all are started anew there, and no sample is lost", ", ".join(died), where)
        del self._made
        self._start()
        return True


class _Work(IterableDataset):
    """What runs in a worker: batches go into the shared places, and only their numbers through the queue."""

    def __init__(self, fill: Fill, first: int, places: list[list[Batch]], together: int) -> None:
        self.fill, self.first, self.places, self.together = fill, first, places, together

    def __iter__(self) -> Iterator[Message]:
        info = get_worker_info()
        assert info is not None
        places = self.places[info.id]
        batches = self.fill(self.first + info.id, info.num_workers, places)
        for place in itertools.cycle(range(0, len(places), self.together)):
            yield [(place + i, next(batches).bad) for i in range(self.together)]


def _cause(exitcode: int | None) -> str:
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode and exitcode < 0 else f"exited with {exitcode}"
