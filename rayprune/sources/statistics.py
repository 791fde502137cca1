"""Mean and standard deviation of a source's input, for normalising it.

One pass in chunks that are merged by the formulas of Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rayprune.sources.base import SampleSource

CHUNK_VALUES = 1 << 22


def input_statistics(source: SampleSource, num_rows: int = 10_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure the mean and standard deviation of the input over at most num_rows evenly spaced samples.

    Returns:
        Mean and standard deviation, float64: one a channel for images (scaled to 0..1), one a feature otherwise.
        The deviation of a constant is given as 1.
    """
    column = source.schema.columns[source.schema.input]
    scale = 255.0 if source.schema.input == "image" else 1.0
    num_rows = min(num_rows, len(source))
    ids = np.arange(num_rows, dtype=np.int64) * len(source) // num_rows
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
