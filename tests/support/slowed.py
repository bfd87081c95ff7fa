"""A process that takes longer for all it does: it is stopped for a part of each PERIOD, as by a clock that is too low.

It need not be alone on its core: what is stopped for a sixth of the time takes a fifth longer, whatever its speed.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil

PERIOD = 0.1


@contextlib.contextmanager
def slowed(process: psutil.Process, slower: float) -> Iterator[None]:
    """Inside the block the process takes longer by this share; it may end meanwhile."""
    over = threading.Event()
    thread = threading.Thread(target=_stop_and_go, args=(process, PERIOD * slower / (1 + slower), over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _stop_and_go(process: psutil.Process, stopped: float, over: threading.Event) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        while not over.is_set():
            began = time.perf_counter()
            process.suspend()
            time.sleep(stopped)
            process.resume()
            # A busy machine stops it longer than it should; then it goes on longer too.
            time.sleep((time.perf_counter() - began) * (PERIOD / stopped - 1))
