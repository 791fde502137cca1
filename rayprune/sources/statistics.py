"""Mean and standard deviation of a source's input, for normalising it.

One pass in chunks that are merged by the formulas of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from rayprune.core.windows import rows_of_groups

if TYPE_CHECKING:
    from rayprune.sources.base import SampleSource

CHUNK_VALUES = 1 << 22
MAX_GROUPS = 64


def input_statistics(source: SampleSource, num_rows: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the mean and standard deviation of the input over at most num_rows evenly spaced samples.

    Where rows are read in groups, the samples come from at most MAX_GROUPS evenly spaced groups.

    Returns:
        Mean and standard deviation, float64: one a channel for images (scaled to 0..1), one a feature otherwise.
        The deviation of a constant is given as 1.
    """
    column = source.schema.columns[source.schema.input]
    scale = 255.0 if source.schema.input == "image" else 1.0
    ids = _evenly_spaced(source, num_rows)
    num_rows = len(ids)
    size = max(1, CHUNK_VALUES // math.prod(column.shape))
    # Relative to the first sample: a constant is then exactly 0, and a large offset costs no digits.
    pivot = source.take(ids[:1])[source.schema.input].reshape(-1, column.shape[-1])[0].astype(np.float64)
    count, mean, squares = 0, np.zeros(column.shape[-1]), np.zeros(column.shape[-1])
    for start in range(0, num_rows, size):
        taken = source.take(ids[start : start + size])[source.schema.input]
        values = taken.reshape(-1, column.shape[-1]).astype(np.float64) - pivot
        shift = values.mean(axis=0) - mean
        total = count + len(values)
        squares += len(values) * values.var(axis=0) + shift**2 * (count * len(values) / total)
        mean += shift * (len(values) / total)
        count = total
    deviation = np.sqrt(squares / count) / scale
    deviation[deviation == 0] = 1.0
    return tuple(((mean + pivot) / scale).tolist()), tuple(deviation.tolist())


def _evenly_spaced(source: SampleSource, num_rows: int) -> np.ndarray:
    groups, total = source.groups, len(source)
    starts = np.unique(groups[groups < total]) if groups is not None else np.empty(0, np.int64)
    if groups is None or len(starts) <= MAX_GROUPS:
        num_rows = min(num_rows, total)
        return np.arange(num_rows, dtype=np.int64) * total // num_rows
    rows = rows_of_groups(starts[np.arange(MAX_GROUPS) * len(starts) // MAX_GROUPS], groups)
    num_rows = min(num_rows, len(rows))
    return rows[np.arange(num_rows) * len(rows) // num_rows]
