"""K-means of numbers: against all partitions into intervals, and against Lloyd's algorithm from many starts."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from rayprune.core.algorithms.kmeans_1d import kmeans_1d


def sum_of_squares(values: NDArray[np.float32], groups: NDArray[np.uint8]) -> float:
    parts = [values[groups == group].astype(np.float64) for group in np.unique(groups)]
    return float(sum(((part - part.mean()) ** 2).sum() for part in parts))


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4])
def test_no_partition_into_intervals_is_better(num_groups: int) -> None:
    rng = np.random.default_rng(num_groups)
    for scale in (1e-6, 1.0, 1e30):
        values = (rng.exponential(size=11) * scale - scale / 2).astype(np.float32)
        groups = kmeans_1d(values, num_groups)
        assert set(groups.tolist()) == set(range(num_groups))
        order = np.argsort(values)
        assert (np.diff(groups[order].astype(int)) >= 0).all()
        best = np.inf
        for cuts in combinations(range(1, values.size), num_groups - 1):
            labels = np.empty(values.size, dtype=np.uint8)
            for label, (start, end) in enumerate(pairwise((0, *cuts, values.size))):
                labels[order[start:end]] = label
            best = min(best, sum_of_squares(values, labels))
        assert sum_of_squares(values, groups) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("num", [2048, 2049, 30_000])
def test_many_numbers_are_as_good_as_the_best_of_many_starts(num: int) -> None:
    rng = np.random.default_rng(num)
    values = np.exp(rng.normal(-3, 2, num)).astype(np.float32)  # losses: most small, a few large
    groups = kmeans_1d(values, 5)
    lloyd = KMeans(5, n_init=5, random_state=0).fit(values[:, None].astype(np.float64))
    assert sum_of_squares(values, groups) <= lloyd.inertia_ * (1.0 + 1e-4)
    assert np.bincount(groups).size == 5
    # Groups are intervals: no number of a group lies inside another.
    edges = [(values[groups == group].min(), values[groups == group].max()) for group in range(5)]
    assert all(low[1] < high[0] for low, high in pairwise(edges))


def test_bins_widen_where_the_numbers_have_many_scales() -> None:
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], 50_000) * 10.0 ** rng.uniform(-30, 30, 50_000)).astype(np.float32)
    groups = kmeans_1d(values, 3)
    assert set(groups.tolist()) == {0, 1, 2}
    assert values[groups == 0].max() < 0 < values[groups == 2].min()


def test_equal_and_few_numbers_are_groups_of_their_own() -> None:
    assert kmeans_1d(np.zeros(4, dtype=np.float32), 3).tolist() == [0] * 4
    assert kmeans_1d(np.array([7.0], dtype=np.float32), 5).tolist() == [0]
    assert kmeans_1d(np.array([2.0, 1.0, 2.0], dtype=np.float32), 5).tolist() == [1, 0, 1]
    zeros = np.tile(np.array([0.0, -0.0], dtype=np.float32), 2000)
    assert not kmeans_1d(zeros, 2).any()
    assert kmeans_1d(np.zeros(0, dtype=np.float32), 2).size == 0


def test_small_differences_of_large_numbers_count() -> None:
    values = np.float32(1000.0) + np.array([0.0, 0.001, 0.5, 0.501], dtype=np.float32)
    assert kmeans_1d(values, 2).tolist() == [0, 0, 1, 1]
