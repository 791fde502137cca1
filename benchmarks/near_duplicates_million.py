"""The search for near-duplicates among a million embeddings of 512 numbers in float16.

Runs only by name (`python -m benchmarks near_duplicates_million`): it takes minutes, and a gigabyte of disk in TMPDIR.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Figure
from benchmarks.near_duplicates import size_figures


def figures() -> Iterator[Figure]:
    """Yield the figures of one run."""
    yield from size_figures(1_000_000, 512, "float16", repetitions=1)
