"""How far each sample is from the others of its class.

Shapes: N samples, R drawn ones, A rows of a block, d numbers of a vector.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, rows_by_label, single, squared_lengths

_CLASS_ROWS = 20  # fewer say little about their class
_MAD = 1.4826  # a normal distribution's standard deviation, relative to its median absolute deviation


def knn_distance(points: Points, k: int = 10, num_reference: int = 2_000, seed: int = 0) -> NDArray[np.float32]:
    """Return the distance of each point to its k-th nearest among randomly drawn points, itself apart, (N,).

    Args:
        points: N of them.
        k: at least 1; less if there are fewer points.
        num_reference: how many points are drawn.
        seed: of the draw.
    """
    num = len(points)
    drawn = np.sort(np.random.default_rng(seed).permutation(num)[:num_reference])
    k = min(k, drawn.size - (drawn.size == num))
    distances = np.zeros(num, dtype=np.float32)
    if k < 1:
        return distances
    reference = points.read(drawn)
    center = np.median(reference, axis=0)
    reference -= center
    unit = math.sqrt(squared_lengths(reference).max()) or 1.0
    reference_R = (reference / unit).astype(np.float32)
    squares_R = np.einsum("rd,rd->r", reference_R, reference_R)
    for rows in points.blocks(max(points.width, drawn.size)):
        left_A = ((points.read(rows) - center) / unit).astype(np.float32)
        squares_AR = left_A @ (-2.0 * reference_R).T
        squares_AR += squares_R
        own = np.flatnonzero((drawn >= rows.start) & (drawn < rows.stop))
        squares_AR[drawn[own] - rows.start, own] = np.inf
        nearest_A = np.partition(squares_AR, k - 1, axis=1)[:, k - 1].astype(np.float64)
        nearest_A += np.einsum("ad,ad->a", left_A, left_A)
        distances[rows] = single(np.sqrt(np.maximum(nearest_A, 0.0)) * unit)
    return distances


def robust_z(values: NDArray[Any], labels: NDArray[np.integer[Any]] | None = None) -> NDArray[np.float32]:
    """Return (value − median) / (1.4826 · median absolute deviation), in each class, (N,).

    Where the deviation is 0, the mean absolute deviation takes its place, and 0 stands for equal values. Classes of
    fewer than 20 samples are measured against all samples.

    >>> robust_z(np.array([1.0, 2.0, 3.0, 4.0, 100.0])).astype(float).round(2).tolist()
    [-1.35, -0.67, 0.0, 0.67, 65.43]
    """
    whole = _z(values)
    if labels is None:
        return whole
    for rows in rows_by_label(labels):
        if rows.size >= _CLASS_ROWS:
            whole[rows] = _z(values[rows])
    return whole


def _z(values: NDArray[Any]) -> NDArray[np.float32]:
    median = np.median(values.astype(np.float64))
    apart = np.abs(values - median)
    scale = _MAD * float(np.median(apart)) or float(apart.mean()) or 1.0
    return ((values - median) / scale).astype(np.float32)
