"""Ends the ranks of a node together when one has died: the launcher ends one after another, up to 30 s each."""

import os
import sys
import threading
import time

import psutil

# Seconds in which a rank may end by itself, and say why, after another rank of its node has ended. Of a hang all ranks
# tell their stacks: their watchdogs act at about the same time.
GRACE = 10.0
POLL_SECONDS = 0.5


class NodeWatch:
    """Ends the ranks of this node by SIGKILL, this one included, GRACE seconds after one of them has ended.

    The ranks of a node are the children of its launcher, which tells their number in LOCAL_SIZE. Each rank watches, so
    one whose threads still run is enough: the others may hang in native code and hold the interpreter's lock.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        ranks = int(os.environ.get("LOCAL_SIZE", "1"))
        if ranks > 1:
            threading.Thread(target=self._watch, args=(ranks - 1,), name="node watch", daemon=True).start()

    def stop(self) -> None:
        """The training is over: call it while all ranks still live, before they meet for the last time."""
        self._stopped.set()

    def _watch(self, number: int) -> None:
        others, until = _other_ranks(), time.monotonic() + GRACE
        while len(others) < number and time.monotonic() < until:  # the launcher may not have started all of them
            if self._stopped.wait(POLL_SECONDS):
                return
            others = _other_ranks()
        if len(others) < number:
            return  # they are not this rank's siblings, in a wrapper or a container each: the launcher ends them
        while all(map(_is_alive, others)):
            if self._stopped.wait(POLL_SECONDS):
                return
        if self._stopped.wait(GRACE):
            return
        line = f"rank {os.environ.get('RANK')} ends because another rank of its node is gone; see that rank's own error"
        sys.stderr.write(f"{line} above\n")
        sys.stderr.flush()
        for other in others:
            if _is_alive(other):
                other.kill()
        os._exit(1)


def _other_ranks() -> list[psutil.Process]:
    try:
        children = psutil.Process(os.getppid()).children()
    except psutil.NoSuchProcess:
        return []
    return [child for child in children if child.pid != os.getpid() and _is_alive(child)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
