"""k_center over a million embeddings of 512 numbers, 10 % kept: seconds, and peak memory.

Runs only by name (`python -m benchmarks k_center`): it takes many minutes, and a gigabyte of disk in TMPDIR.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.geometry import method_figures
from benchmarks.harness import Figure


def figures() -> Iterator[Figure]:
    """Yield the figures of one run."""
    yield from method_figures("k_center", 1_000_000, 512, "float16", repetitions=1)
