"""Work that is shared out among forked processes, whose progress is told."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from data.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")
_work: list[Callable[[Any], Any]] = []


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, unit: str, what: str, to: str = "",
    start: int = 0,
) -> Iterator[Result]:  # fmt: skip
    """work(item) of each item, in their order, made by so many processes; by this one if there is one of either.

    work: is inherited by the processes, so it may hold what is large.  unit, what, to: as of Progress.  start: how many
    are done and no longer among the items.
    Raises: ValueError if a process dies; what `work` raises.
    """
    workers = min(workers, len(items))
    with Progress(what, start + len(items), unit, to, start) as progress:
        if workers <= 1:
            for item in items:
                yield work(item)
                progress.update()
            return
        # Forked: to import everything again would take longer than most items. Ctrl-C is for the parent alone.
        with ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(work,)) as pool:
            try:
                for result in pool.map(_call, items):
                    yield result
                    progress.update()
            except BrokenProcessPool:
                raise ValueError(
                    f"a worker of {what} died, perhaps out of memory: take fewer than workers={workers}"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _work[:] = [work]


def _call(item: Any) -> Any:
    return _work[0](item)
