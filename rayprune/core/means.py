"""Means of signals over a run's visits, beside whatever a method keeps: EL2N and AUM scores, among others.

Shapes: N samples, B observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.table import ScoreTable

_VISITS = "visits"


def mean_columns(record: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns that the means of the named signals need, name → dtype.

    >>> sorted(mean_columns(("el2n",)))
    ['el2n_mean', 'visits']
    """
    return {**{f"{name}_mean": np.float32 for name in record}, **({_VISITS: np.int32} if record else {})}


def fold_means(
    table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], record: tuple[str, ...]
) -> None:
    """Add one visit of (B,) distinct ids to the means.

    Raises:
        ValueError: a signal is not one number a sample.
    """
    if not record or not ids.size:
        return
    visits = table[_VISITS][ids] + 1
    for name in record:
        seen = np.asarray(signals[name], dtype=np.float64)
        if seen.ndim != 1:
            raise ValueError(f"signal {name!r} has {seen.shape[1:]} numbers a sample: train.record takes single ones")
        column = table[f"{name}_mean"]
        old = np.where(visits == 1, 0.0, column[ids])
        column[ids] = old + (seen - old) / visits
    table[_VISITS][ids] = visits


def mean_scores(table: ScoreTable, record: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Return name → (N,) means, NaN where never visited, and the visits that they are over."""
    return {name: table[name] for name in mean_columns(record)}
