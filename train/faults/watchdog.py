"""Ends a rank that hangs, after it has printed its stacks."""

import faulthandler
import os
import sys
import tempfile
import threading
import time

# What the interpreter's own timer, which needs no lock of Python's, waits longer than the thread that can say more.
GRACE = 30.0


class Watchdog:
    """Ends this process, after printing the stack of each of its threads, when it was not fed for so many seconds.

    A rank that hangs holds up all others, so each of them prints its own, and the one that differs is the culprit.
    """

    def __init__(self, rank: int, seconds: float) -> None:
        self._rank, self._seconds, self._armed = rank, seconds, 0.0
        self._stopped = threading.Event()
        self.feed(3 * seconds)  # the first step may compile the net
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def feed(self, seconds: float = 0.0) -> None:
        """All is well for so many seconds from now on."""
        now, wanted = time.monotonic(), seconds or self._seconds
        self._until = now + wanted
        if seconds or now - self._armed > GRACE / 3:  # not each time, for it starts a thread
            faulthandler.dump_traceback_later(wanted + GRACE, exit=True)
            self._armed = now

    def stop(self) -> None:
        """The training is over."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._seconds / 4, 5.0)):
            if time.monotonic() > self._until:
                self._end()

    def _end(self) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = "".join(f"rank {self._rank} | {line}" for line in file)
        # In one piece, for other ranks write to the same place.
        sys.stderr.write(f"rank {self._rank}: HANGS, no progress for {self._seconds:g} s. Its threads:\n{stacks}")
        sys.stderr.flush()
        os._exit(1)
