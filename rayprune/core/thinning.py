"""Unbiased random thinning: exact-size draws within strata, with inverse-probability weights.

A stratum keeps m of its n samples. m is k·n rounded at random to a neighboring integer, so that every sample's
inclusion probability is exactly k, and the weight is 1/k: the weighted sum over the kept samples has the full sum as
its expectation (Horvitz and Thompson, JASA 1952). Rounding down, as the InfoBatch reference does, biases small strata.

Shapes: N samples, S strata, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.selection import Selection
from rayprune.core.table import chunks

# Generator.hypergeometric takes populations below 10^9. Larger strata are divided by ranges of ids: the inclusion
# probabilities and the sum are the same.
_MAX_STRATUM = 10**9 - 1


def thin(
    strata: NDArray[np.unsignedinteger[Any]], keep_ratios: NDArray[np.float64], rng: np.random.Generator
) -> Selection:
    """Keep a random share of each stratum.

    Args:
        strata: (N,) unsigned integers; 0 = kept whole with weight 1, s ≥ 1 = thinned to `keep_ratios[s - 1]`.
        keep_ratios: (S,) float64 in (0, 1].
        rng: the epoch's generator.

    Returns:
        A Selection whose inclusion probabilities are exactly the keep ratios; the caller sets its `requested`.
    """
    num_strata = keep_ratios.size + 1
    remaining = np.zeros(num_strata, dtype=np.int64)
    for rows in chunks(strata.size):
        remaining += np.bincount(strata[rows], minlength=num_strata)
    if remaining[1:].max(initial=0) > _MAX_STRATUM:
        parts = -(-strata.size // _MAX_STRATUM)
        return thin(_by_ranges(strata, keep_ratios.size, parts), np.tile(keep_ratios, parts), rng)
    expected_drops = float(np.sum(remaining[1:] * (1.0 - keep_ratios)))
    to_keep = np.concatenate([remaining[:1], round_at_random(remaining[1:] * keep_ratios, rng)])
    codes = strata.astype(np.min_scalar_type(num_strata)) + np.uint8(1)
    for rows in chunks(strata.size):
        _thin_chunk(codes[rows], remaining, to_keep, rng)
    weights = np.concatenate([[1.0], 1.0 / keep_ratios]).astype(np.float32)
    return Selection(codes, weights, expected_drops=expected_drops)


def _by_ranges(strata: NDArray[np.unsignedinteger[Any]], num_strata: int, parts: int) -> NDArray[Any]:
    """Divide every stratum by ranges of ids, none longer than a draw can be."""
    fine = np.zeros(strata.size, dtype=np.min_scalar_type(num_strata * parts))
    for rows in chunks(strata.size):
        part = np.arange(rows.start, rows.stop) // _MAX_STRATUM
        fine[rows] = np.where(strata[rows] > 0, strata[rows] + part * num_strata, 0)
    return fine


def _thin_chunk(
    codes: NDArray[Any], remaining: NDArray[np.int64], to_keep: NDArray[np.int64], rng: np.random.Generator
) -> None:
    """Prune within one chunk in place; subtract its samples from `remaining` and its kept samples from `to_keep`."""
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes, minlength=remaining.size + 1)[1:]
    ends = np.cumsum(counts)
    for stratum in np.flatnonzero(counts[1:]) + 1:
        count = int(counts[stratum])
        # The number of kept samples in this chunk, distributed as in one uniform draw over the whole stratum.
        kept = int(rng.hypergeometric(count, remaining[stratum] - count, to_keep[stratum])) if to_keep[stratum] else 0
        remaining[stratum] -= count
        to_keep[stratum] -= kept
        if kept < count:
            rows = order[ends[stratum] - count : ends[stratum]]
            codes[rows[rng.choice(count, count - kept, replace=False, shuffle=False)]] = 0


def round_at_random(expected: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Round (S,) numbers to neighboring integers with the numbers as expectations.

    A single draw serves all (systematic sampling of the fractions), so that their sum is also rounded to a neighbor:
    several strata that each might drop a sample never all drop none by chance. Values within 1e-9 of an integer are
    exact.

    >>> round_at_random((1 - np.array([0.8, 0.5])) * 5, np.random.default_rng(0)).tolist()
    [1, 3]
    """
    nearest = np.round(expected)
    exact = np.abs(expected - nearest) <= 1e-9 * np.maximum(1.0, np.abs(expected))
    low = np.where(exact, nearest, np.floor(expected))
    fractions = np.where(exact, 0.0, expected - low)
    steps = np.floor(np.cumsum(np.concatenate([[rng.random()], fractions])))
    rounded: NDArray[np.int64] = (low + np.diff(steps)).astype(np.int64)
    return rounded


def thin_with_class_floor(
    strata: NDArray[np.unsignedinteger[Any]],
    keep_ratios: NDArray[np.float64],
    labels: NDArray[Any],
    class_floor: float,
    rng: np.random.Generator,
) -> Selection:
    """Thin as `thin` does, but keep at least the share `class_floor` of every class, still without bias.

    For a class that would fall below the floor, the keep ratios move toward 1 before the draw; a correction after the
    draw would bias the weights. Where rounding down could break the floor, counts are rounded up, so it holds exactly.

    Args:
        strata, keep_ratios, rng: as in `thin`.
        labels: (N,) integers in [0, C).
        class_floor: share in (0, 1].
    """
    width = keep_ratios.size + 1
    num_classes = int(labels.max(initial=0)) + 1
    counts = np.zeros(num_classes * width, dtype=np.int64)
    for rows in chunks(strata.size):
        counts += np.bincount(labels[rows].astype(np.int64) * width + strata[rows], minlength=counts.size)
    counts_CS = counts.reshape(num_classes, width)
    keep_S = np.concatenate([[1.0], keep_ratios])
    expected_C = counts_CS @ keep_S
    size_C = counts_CS.sum(axis=1)
    short_C = np.maximum(class_floor * size_C - expected_C, 0.0)
    spare_C = np.maximum(size_C - expected_C, 1e-300)
    keep_CS = keep_S + (short_C / spare_C)[:, None] * (1.0 - keep_S)
    rounded_up_CS = np.ceil(np.round(keep_CS * counts_CS, 6)) / np.maximum(counts_CS, 1)
    # Random rounding loses less than one sample in each of a class's strata.
    binds_C = expected_C - keep_ratios.size < class_floor * size_C
    exact_CS = np.where(binds_C[:, None] & (counts_CS > 0), rounded_up_CS, keep_CS)[:, 1:]
    fine = np.zeros(strata.size, dtype=np.min_scalar_type(num_classes * (width - 1) + 1))
    for rows in chunks(strata.size):
        coarse = strata[rows].astype(np.int64)
        fine[rows] = np.where(coarse > 0, labels[rows].astype(np.int64) * (width - 1) + coarse, 0)
    return thin(fine, exact_CS.ravel(), rng)
