"""Sample ids at the edge: int64 in [0, N), never through a floating-point type."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_ids(ids: ArrayLike, num_samples: int) -> NDArray[np.int64]:
    """Check ids and return them as (B,) int64.

    Args:
        ids: (B,) of any integer dtype.
        num_samples: N; every id must lie in [0, N).

    Raises:
        ValueError: another dtype or shape, or an id out of range (the first few are named).

    >>> as_ids([2, 0], num_samples=3)
    array([2, 0])
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        # A float32 cannot tell id 16,777,217 from its neighbour, so ids that were floats are already lost.
        raise ValueError(f"ids must be a 1-d array of integers, got {array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() >= num_samples:
        unknown = array[(array < 0) | (array >= num_samples)]
        raise ValueError(f"unknown ids {unknown[:5].tolist()}: ids go from 0 to {num_samples - 1}")
    return array.astype(np.int64, copy=False)
