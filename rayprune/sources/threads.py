"""Work on many rows in a few threads of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> list[Result]:
    """Call a function for every item in a few threads; results come in the items' order, the first error is raised."""
    items = list(items)
    if min(count, len(items)) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(count, len(items)), thread_name_prefix="rayprune-decode") as pool:
        return list(pool.map(function, items))
