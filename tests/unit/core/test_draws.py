"""Masks of the highest scores and of draws: against sorting, and against closed-form probabilities."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core.draws import draw_uniform, draw_weighted, highest, highest_by_class

NUM_DRAWS = 20_000


def by_sorting(scores: NDArray[np.float32], count: int) -> set[int]:
    """Return the ids of the highest scores: NaN first, then by score, among equal ones the lower ids."""
    order = sorted(range(len(scores)), key=lambda i: (not np.isnan(scores[i]), -np.nan_to_num(scores[i]), i))
    return set(order[:count])


@pytest.mark.parametrize("num_levels", [1, 3, 1000])
def test_the_highest_are_those_of_a_sort(num_levels: int) -> None:
    rng = np.random.default_rng(num_levels)
    for num in (1, 2, 7, 40):
        for share_missing in (0.0, 0.3, 1.0):
            scores = rng.integers(-num_levels, num_levels, num).astype(np.float32)
            scores[rng.random(num) < share_missing] = np.nan
            for count in range(num + 1):
                kept = highest(scores, count)
                assert set(np.flatnonzero(kept).tolist()) == by_sorting(scores, count)


def test_pools_marked_by_minus_infinity_come_last() -> None:
    scores = np.array([-np.inf, 1.0, -np.inf, -5.0, np.nan], dtype=np.float32)
    assert np.flatnonzero(highest(scores, 3)).tolist() == [1, 3, 4]
    assert np.flatnonzero(highest(scores, 4)).tolist() == [0, 1, 3, 4]


def test_each_class_keeps_its_highest() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 3, 4], 60)  # class 2 is absent
    scores = rng.integers(0, 5, 60).astype(np.float32)
    quotas = np.array([3, 0, 0, 7, int((labels == 4).sum())])
    kept = highest_by_class(scores, labels, quotas)
    for label, quota in enumerate(quotas.tolist()):
        rows = np.flatnonzero(labels == label)
        assert set(np.flatnonzero(kept & (labels == label)).tolist()) == {
            int(rows[i]) for i in by_sorting(scores[rows], quota)
        }


def inclusion(weights: list[float], count: int) -> NDArray[np.float64]:
    """Return the probability that each sample is among `count` successive draws, by enumeration."""
    probabilities = np.zeros(len(weights))
    for order in permutations(range(len(weights)), count):
        left, product = sum(weights), 1.0
        for sample in order:
            product *= weights[sample] / left
            left -= weights[sample]
        probabilities[list(order)] += product
    return probabilities


@pytest.mark.parametrize(("weights", "count"), [([1.0, 2.0, 4.0, 0.5], 2), ([1.0, 2.0, 4.0, 0.5], 3), ([5.0, 1.0], 1)])
def test_weighted_draws_have_the_probabilities_of_successive_draws(weights: list[float], count: int) -> None:
    expected = inclusion(weights, count)
    rng, times = np.random.default_rng(1), np.zeros(len(weights))
    for _ in range(NUM_DRAWS):
        kept = draw_weighted(np.array(weights, dtype=np.float32), count, rng)
        assert kept.sum() == count
        times += kept
    deviation = 5 * np.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert (np.abs(times / NUM_DRAWS - expected) < deviation + 1e-9).all()
    if count > 1:  # M·w/Σw, the inclusion with replacement, is another distribution
        assert (np.abs(count * np.array(weights) / sum(weights) - expected) > deviation).any()


def test_weight_zero_is_drawn_last_and_no_weight_first() -> None:
    weights = np.array([0.0, 1e-30, 3.0, np.nan, 0.0])
    rng, last = np.random.default_rng(0), set()
    for _ in range(50):
        assert np.flatnonzero(draw_weighted(weights, 3, rng)).tolist() == [1, 2, 3]
        last |= set(np.flatnonzero(draw_weighted(weights, 4, rng)).tolist()) - {1, 2, 3}
    assert last == {0, 4}  # weights of 0 are equal among themselves


def test_draws_of_several_chunks_are_exact_in_number_and_uniform_over_them() -> None:
    num, count = 200_000, 50_000
    kept = draw_weighted(np.ones(num, dtype=np.float32), count, np.random.default_rng(0))
    assert kept.sum() == count
    parts = kept.reshape(10, -1).mean(axis=1)
    assert np.abs(parts - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 20_000)
    # A quarter of the samples has half of the total weight, and few draws change little of that.
    weights = np.where(np.arange(num) < num // 4, 3.0, 1.0)
    heavy = draw_weighted(weights, 100, np.random.default_rng(1))[: num // 4].sum()
    assert abs(heavy - 50) < 5 * np.sqrt(25)


def test_uniform_draws_are_uniform_over_the_candidates() -> None:
    candidates = np.array([True, False, True, True, True])
    times = np.zeros(5)
    for seed in range(4000):
        kept = draw_uniform(candidates, 3, np.random.default_rng(seed))
        assert kept.sum() == 3
        times += kept
    assert times[1] == 0
    assert np.abs(times[candidates] / 4000 - 0.75).max() < 5 * np.sqrt(0.75 * 0.25 / 4000)
    assert not draw_uniform(candidates, 0, np.random.default_rng(0)).any()
