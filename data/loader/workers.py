"""Loader processes, which write batches into memory shared with the trainer and are replaced if they are killed."""

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

# A message costs worker and trainer 0.1 to 0.3 ms, so each announces the batches of at least so many samples.
SAMPLES_PER_MESSAGE = 32
# Messages that a worker may be ahead of the trainer. It has buffers for one more, to go on while the trainer copies.
PREFETCH = 2
# After so many deaths without a batch in between, the cause is taken to be permanent and the run ends.
MAX_DEATHS = 3
# Seconds without a batch after which the trainer checks that all workers are alive; and after which they are taken to
# hang, unless the caller has another limit (a training does: train/faults/limits.py).
POLL_SECONDS, HANG_SECONDS = 1.0, 540.0


class LoaderDied(RuntimeError):
    """The worker processes die again and again before the same batch, or hang."""


# fill(first, stride, buffers): writes the batches numbered first, first + stride, ... to the buffers in turn.
Fill = Callable[[int, int, list[Batch]], Iterator[Batch]]
# The buffer's index and the bad samples of each batch that a worker has made since its last message.
Message = list[tuple[int, list[tuple[str, str]]]]


class Workers:
    """The batches from number `first` on, in order and without end. Each is a copy in memory of its own.

    fill: runs in the workers.  new_buffer: makes one batch in shared memory.
    describe: says where the batch of a number comes from, for a message.
    patience: seconds without a batch after which the workers are taken to hang.
    Raises: LoaderDied, and whatever a worker raised, from next().
    """

    def __init__(
        self, fill: Fill, new_buffer: Callable[[], Batch], describe: Callable[[int], str], first: int, workers: int,
        pin_memory: bool, patience: float = HANG_SECONDS,
    ) -> None:  # fmt: skip
        self._fill, self._new_buffer, self._describe = fill, new_buffer, describe
        self._next, self._workers, self._pin_memory = first, workers, pin_memory
        self._deaths, self._patience = 0, patience
        self._start()

    def __iter__(self) -> "Workers":
        return self

    def __next__(self) -> Batch:
        while True:
            round_, worker = divmod(self._next - self._first, self._workers)
            in_message = round_ % self._batches_per_message
            if in_message or self._receive(worker):
                break
        buffer, bad = self._messages[worker][in_message]
        batch = self._buffers[worker][buffer].copy(self._pin_memory)
        batch.bad = bad
        self._next, self._deaths = self._next + 1, 0
        return batch

    def _receive(self, worker: int) -> bool:
        """Wait for a worker's next message. False if all workers had to be started again instead."""
        start = time.monotonic()
        while True:
            try:
                self._messages[worker] = next(self._received)
                return True
            except Exception as error:
                if self._replace_or_raise(error, time.monotonic() - start):
                    return False

    def _start(self) -> None:
        self._first = self._next
        self._messages: list[Message] = [[] for _ in range(self._workers)]
        self._buffers = [[self._new_buffer()] for _ in range(self._workers)]
        self._batches_per_message = -(-SAMPLES_PER_MESSAGE // len(self._buffers[0][0].visit))
        for buffers in self._buffers:
            buffers += [self._new_buffer() for _ in range((PREFETCH + 1) * self._batches_per_message - 1)]
        messages = _Messages(self._fill, self._next, self._buffers, self._batches_per_message)
        # With its own generator, so that a restart does not draw from the trainer's.
        loader = DataLoader(
            messages, batch_size=None, num_workers=self._workers, prefetch_factor=PREFETCH,
            timeout=POLL_SECONDS, multiprocessing_context="fork", generator=torch.Generator(),
        )  # fmt: skip
        on_child = signal.getsignal(signal.SIGCHLD)
        self._received = iter(loader)
        # A private name, but active_children() no longer lists a process that died at once.
        self._processes = list(self._received._workers)  # type: ignore[attr-defined]
        if threading.current_thread() is threading.main_thread():
            # DataLoader's handler would raise at any line of the trainer when a worker dies. The next batch shows it.
            signal.signal(signal.SIGCHLD, on_child)

    def _replace_or_raise(self, error: Exception, waited: float) -> bool:
        """Start all workers again if one has died: True. Otherwise raise the error; False if only no batch came yet."""
        no_batch_yet = str(error).startswith("DataLoader timed out")
        # The connections of a killed process break a moment before the process counts as ended.
        wait([process.sentinel for process in self._processes], timeout=0 if no_batch_yet else 1)
        died = [f"pid {p.pid} {_cause(p.exitcode)}" for p in self._processes if p.exitcode is not None]
        if not died and no_batch_yet and waited < self._patience:
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
        if self._deaths == MAX_DEATHS:
            raise LoaderDied(
                f"loader worker {', '.join(died)} {where}, {MAX_DEATHS} times in a row: if the machine ran out of "
                "memory, lower data.shuffle_block or data.workers; if not, look at these shards"
            ) from None
        logger.warning(
            "loader worker %s %s; all are started again there, and no sample is lost", ", ".join(died), where
        )
        del self._received
        self._start()
        return True


class _Messages(IterableDataset):
    """The messages of a worker: it writes batches to the shared buffers and sends only the buffers' indices."""

    def __init__(self, fill: Fill, first: int, buffers: list[list[Batch]], batches_per_message: int) -> None:
        self.fill, self.first, self.buffers, self.batches_per_message = fill, first, buffers, batches_per_message

    def __iter__(self) -> Iterator[Message]:
        info = get_worker_info()
        assert info is not None
        buffers = self.buffers[info.id]
        batches = self.fill(self.first + info.id, info.num_workers, buffers)
        for buffer in itertools.cycle(range(0, len(buffers), self.batches_per_message)):
            yield [(buffer + i, next(batches).bad) for i in range(self.batches_per_message)]


def _cause(exitcode: int | None) -> str:
    return f"was killed by {signal.Signals(-exitcode).name}" if exitcode and exitcode < 0 else f"exited with {exitcode}"
