"""Ends a rank that hangs, after printing the stacks of its threads."""

import faulthandler
import os
import sys
import tempfile
import threading
import time

from data.progress import end_lines
from train.faults.limits import FIRST

# Seconds that the interpreter's own timer waits longer than the watchdog's thread. The thread prints more; the timer
# also works while another thread holds the interpreter's lock.
GRACE = 30.0


class Watchdog:
    """Ends this process, after printing the stack of each of its threads, when it was not reset for `seconds`.

    A rank that hangs makes all others wait, so each of them prints its stacks; the one that differs is the culprit.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self._rank, self._seconds, self._timer_started = rank, seconds, 0.0
        self._waits = 0.0
        self._stopped = threading.Event()
        self.reset(FIRST)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def reset(self, times: float = 1.0) -> None:
        """Start the countdown again, from its usual length or, once, from a multiple of it (train/faults/limits.py)."""
        now, wanted = time.monotonic(), times * self._seconds
        # Not every time, since it starts a thread.
        if wanted != self._waits or now - self._timer_started > GRACE / 3:
            faulthandler.dump_traceback_later(wanted + GRACE, exit=True)
            self._timer_started = now
        self._deadline, self._waits = now + wanted, wanted

    def stop(self) -> None:
        """End the countdown: the training is over."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._seconds / 4, 1.0)):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = "".join(f"rank {self._rank} | {line}" for line in file)
        end_lines()
        # In one write, since other ranks write to the same stream.
        sys.stderr.write(f"rank {self._rank}: HANGS, no progress for {self._waits:g} s. Its threads:\n{stacks}")
        sys.stderr.flush()
        os._exit(1)
