"""Classes of samples: checked labels, the floor that no class falls below, the shares that are kept.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.selection import Selection

# Classes are counted in arrays as long as the largest label; above this, and this many a sample, labels are ids.
_USUAL_CLASSES, _CLASSES_A_SAMPLE = 1 << 20, 10


def checked_labels(labels: ArrayLike, num_samples: int) -> NDArray[Any]:
    """Return (N,) labels in the smallest unsigned dtype.

    Raises:
        ValueError: they are no N integers from 0, or so large that they look like ids.
    """
    array = np.asarray(labels)
    if array.shape != (num_samples,) or array.dtype.kind not in "iu":
        raise ValueError(f"labels must be {num_samples} integers, got {array.dtype} of shape {array.shape}")
    if array.min() < 0:
        raise ValueError(f"labels must be at least 0, got {array.min()}")
    if array.max() >= max(_USUAL_CLASSES, _CLASSES_A_SAMPLE * num_samples):
        raise ValueError(f"labels look like ids: the largest of {num_samples} is {array.max()}; number classes from 0")
    return array.astype(np.min_scalar_type(int(array.max())))  # classes are few: 1 or 2 bytes a sample, not 8


def top_up(selection: Selection, labels: NDArray[Any], floor: float, rng: np.random.Generator) -> Selection:
    """Add pruned samples at weight 1 to classes that keep less than the share `floor`.

    Methods that thin at random hold the floor without bias inside `EpochContext.thin`, and nothing is added to them.
    """
    kept = selection.codes != 0
    kept_C = np.bincount(labels[kept], minlength=int(labels.max()) + 1)
    short_C = np.ceil(np.round(floor * np.bincount(labels), 6)).astype(np.int64) - kept_C
    if not (short_C > 0).any():
        return selection
    extra = [
        rng.choice(np.flatnonzero((labels == label) & ~kept), short_C[label], replace=False)
        for label in np.flatnonzero(short_C > 0)
    ]
    ids = np.concatenate([selection.ids, *extra])
    added = np.ones(ids.size - selection.num_kept, dtype=np.float32)
    filled = Selection.of_ids(ids, selection.num_samples, weights=np.concatenate([selection.weights, added]))
    forward_only = np.setdiff1d(selection.forward_only_ids, ids)
    return replace(selection, codes=filled.codes, weight_values=filled.weight_values, forward_only_ids=forward_only)


def kept_shares(selection: Selection, labels: NDArray[Any]) -> list[float | None]:
    """Return the share of each class that is kept, (C,); None for a class without samples.

    >>> kept_shares(Selection.of_ids([0], 3), np.array([0, 0, 2]))
    [0.5, None, 0.0]
    """
    size_C = np.bincount(labels)
    kept_C = np.bincount(labels[selection.codes != 0], minlength=size_C.size)
    return [
        round(kept / size, 6) if size else None for kept, size in zip(kept_C.tolist(), size_C.tolist(), strict=True)
    ]
