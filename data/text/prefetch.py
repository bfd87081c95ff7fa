"""An iterator worked off by a thread, so that what follows need not wait for it."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


def prefetch(items: Iterable[T], most: int) -> Iterator[T]:
    """The items in their order, made in a thread that is at most so many ahead; what it raises is raised here."""
    made = iter(items)
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, made, _END) for _ in range(most))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, made, _END))
            yield item
