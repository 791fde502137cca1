"""Seconds and peak memory of CRAIG for a million samples with gradients of 512 numbers."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gradients import figures_of
from benchmarks.harness import Figure


def figures() -> Iterator[Figure]:
    """Yield the figures class by class, and over all samples in random parts."""
    return figures_of(({"name": "craig"}, {"name": "craig", "balance": "none"}), 1_000_000, 512)
