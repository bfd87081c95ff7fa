"""Running an iterator in a thread, ahead of its consumer."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

_END: Any = object()


def prefetch(items: Iterable[T], ahead: int) -> Iterator[T]:
    """The items in order, computed in a thread that is at most `ahead` items ahead. Its errors are raised here."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as thread:
        futures = deque(thread.submit(next, iterator, _END) for _ in range(ahead))
        while (item := futures.popleft().result()) is not _END:
            futures.append(thread.submit(next, iterator, _END))
            yield item
