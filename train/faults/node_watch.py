"""Ends the ranks of a node together when one has died, and stops the run when their launcher has.

The launcher itself ends one rank after another, up to 30 s each; without it nothing would end them.
"""

import os
import signal
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

    If the launcher has ended, each rank sends itself SIGTERM: all ranks save and leave.

    The ranks of a node are the children of its launcher, which tells their number in LOCAL_SIZE. Each rank watches, so
    one whose threads still run is enough: the others may hang in native code and hold the interpreter's lock.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        if "LOCAL_SIZE" in os.environ:  # without a launcher the parent is a shell, which may end as it likes
            launcher = os.getppid()
            threading.Thread(target=self._watch_launcher, args=(launcher,), name="launcher watch", daemon=True).start()
        ranks = int(os.environ.get("LOCAL_SIZE", "1"))
        if ranks > 1:
            threading.Thread(target=self._watch, args=(ranks - 1,), name="node watch", daemon=True).start()

    def stop(self) -> None:
        """The training is over: call it while all ranks still live, before they meet for the last time."""
        self._stopped.set()

    def _watch_launcher(self, launcher: int) -> None:
        while os.getppid() == launcher:
            if self._stopped.wait(POLL_SECONDS):
                return
        sys.stderr.write(f"rank {os.environ.get('RANK')}: its launcher is gone, so the run stops as by SIGTERM\n")
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGTERM)

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
