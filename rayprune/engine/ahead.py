"""Items fetched in a thread before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], depth: int, name: str, *, join: bool = True) -> Iterator[T]:
    """Yield items as they come, fetched in a thread up to `depth` of them before they are asked for.

    Args:
        items: whose errors are raised where their item would have come.
        depth: at least 1.
        name: of the thread.
        join: where the consumer stops early, wait for the fetch under way and close `items`. False for items that may
            never come.
    """
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    waiting: deque[Future[object]] = deque(pool.submit(next, items, end) for _ in range(depth))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # all but the end are T
    finally:
        pool.shutdown(wait=join, cancel_futures=True)
        if join and isinstance(items, Generator):
            items.close()
