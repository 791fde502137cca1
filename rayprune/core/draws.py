"""Masks of the highest scores and of random draws, exact in number, in time and memory of O(N).

A weighted draw without replacement takes the highest of the keys ln w_i + G_i with independent Gumbel numbers G_i: the
first sample is drawn with probability w_i / Σw, the next one in the same way from the rest, and so on (Efraimidis and
Spirakis, Information Processing Letters 2006; Gumbel numbers are −ln of exponential ones). The keys are float32: this
is exact up to their rounding, a relative error of about 1e-6 in the probabilities.

Shapes: N samples, M kept, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.table import chunks
from rayprune.core.thinning import thin


def highest(scores: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Return a mask of the `count` highest scores; NaN, a sample without a score, comes before all numbers.

    Args:
        scores: (N,) floating.
        count: M, in [0, N]. Among equal scores the lower ids are kept.

    >>> highest(np.array([0.3, 0.9, np.nan, 0.9]), 2).tolist()
    [False, True, True, False]
    """
    if not 0 < count < scores.size:
        return np.full(scores.size, count > 0)
    edge = np.partition(scores, scores.size - count)[scores.size - count]  # NumPy sorts NaN behind all numbers
    if np.isnan(edge):
        kept, tied = np.zeros(scores.size, dtype=bool), np.isnan(scores)
    else:
        kept, tied = ~(scores <= edge), scores == edge
    kept[np.flatnonzero(tied)[: count - np.count_nonzero(kept)]] = True
    return kept


def highest_by_class(scores: NDArray[Any], labels: NDArray[Any], quotas: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return a mask of the `quotas[c]` highest scores of every class c, as `highest` chooses them.

    Args:
        scores: (N,) floating.
        labels: (N,) integers in [0, C).
        quotas: (C,), at most the class sizes.

    >>> highest_by_class(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1]), np.array([1, 2])).tolist()
    [False, True, True, True]
    """
    # Few classes fit in one or two bytes, which NumPy sorts in linear time.
    order = np.argsort(labels.astype(np.min_scalar_type(quotas.size)), kind="stable")
    ends = np.cumsum(np.bincount(labels, minlength=quotas.size))
    kept = np.zeros(scores.size, dtype=bool)
    for start, end, quota in zip(ends - np.diff(ends, prepend=0), ends, quotas.tolist(), strict=True):
        rows = order[start:end]
        kept[rows[highest(scores[rows], quota)]] = True
    return kept


def draw_keys(log_weights: NDArray[Any], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return (N,) float32 keys whose M highest are a draw of M samples without replacement.

    Args:
        log_weights: (N,) ln w, finite; NaN for samples that are drawn before all others.
        rng: the epoch's generator.
    """
    keys = np.empty(log_weights.size, dtype=np.float32)
    for rows in chunks(keys.size):
        exponential = np.maximum(rng.standard_exponential(rows.stop - rows.start), np.finfo(np.float64).tiny)
        keys[rows] = log_weights[rows] - np.log(exponential)
    return keys


def draw_weighted(weights: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask of `count` samples drawn without replacement with probabilities in proportion to their weights.

    Args:
        weights: (N,) at least 0; weight 0 is drawn after all others, and NaN before them.
        count: M, in [0, N].
        rng: the epoch's generator.
    """
    return highest(draw_keys(np.log(np.maximum(weights, np.finfo(np.float32).tiny)), rng), count)


def draw_uniform(candidates: NDArray[np.bool_], count: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a mask of `count` samples drawn uniformly, without replacement, where (N,) `candidates` is True.

    >>> draw_uniform(np.array([True, False, True]), 2, np.random.default_rng(0)).tolist()
    [True, False, True]
    """
    if count < 1:
        return np.zeros_like(candidates)
    share = count / int(np.count_nonzero(candidates))
    kept: NDArray[np.bool_] = thin(candidates.view(np.uint8), np.array([share]), rng).codes > 1
    return kept
