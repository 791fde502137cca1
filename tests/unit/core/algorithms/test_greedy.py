"""Farthest-first traversal, herding and discounts against naive loops, in pools and blocks of any size."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core.algorithms import greedy
from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.greedy import at_random, by_class, farthest_first, herding, highest_with_discounts


def naive_traversal(vectors: NDArray[Any], count: int, start: int) -> list[int]:
    """Recompute all distances for each point taken."""
    wide, order = vectors.astype(np.float64), [start]
    while len(order) < count:
        distances = np.sqrt(np.square(wide[:, None] - wide[order]).sum(axis=2)).astype(np.float32).min(axis=1)
        distances[order] = -1
        order.append(int(distances.argmax()))
    return order


def naive_herding(vectors: NDArray[Any], count: int) -> list[int]:
    wide = vectors.astype(np.float64)
    mean, order = wide.mean(axis=0), list[int]()
    for step in range(count):
        rest = (step + 1) * mean - wide[order].sum(axis=0)
        distances = np.linalg.norm(rest - wide, axis=1).astype(np.float32)
        distances[order] = np.inf
        order.append(int(distances.argmin()))
    return order


@pytest.mark.parametrize("pool", [1, 2, 5, 1000])
@pytest.mark.parametrize("kind", ["grid", "normal", "clusters"])
def test_the_traversal_is_exact_whatever_the_pool(monkeypatch: pytest.MonkeyPatch, pool: int, kind: str) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        num, width = int(rng.integers(2, 90)), int(rng.integers(1, 4))
        vectors = rng.normal(size=(num, width)).astype(np.float32)
        if kind == "grid":  # many ties, and vectors that repeat
            vectors = rng.integers(-2, 3, (num, width)).astype(np.float16)
        if kind == "clusters":
            vectors = (vectors + 50 * rng.integers(0, 3, (num, 1))).astype(np.float16)
        monkeypatch.setattr(greedy, "_POOL_NUMBERS", pool * width)
        monkeypatch.setattr(greedy, "_ROWS", 1 + seed % 5)
        count, start = int(rng.integers(1, num + 1)), int(rng.integers(num))
        order, radii = farthest_first(Points(vectors), count, start)
        assert order.tolist() == naive_traversal(vectors, count, start)
        assert (np.diff(radii[1:]) <= 0).all()


def test_the_traversal_starts_nearest_the_mean() -> None:
    vectors = np.array([[0.0], [4.0], [5.0], [11.0]], np.float32)
    assert farthest_first(Points(vectors), 2)[0].tolist() == [2, 3]
    assert farthest_first(Points(np.ones((4, 2), np.float32)), 3)[0].tolist() == [0, 1, 2]


def test_the_radius_is_at_most_twice_the_best() -> None:
    for seed in range(20):
        vectors = np.random.default_rng(seed).normal(size=(9, 2)).astype(np.float32)
        distances = np.linalg.norm(vectors[:, None] - vectors, axis=2)
        best = min(distances[list(centers)].min(axis=0).max() for centers in combinations(range(9), 3))
        order, _ = farthest_first(Points(vectors), 3)
        assert distances[order].min(axis=0).max() <= 2 * best + 1e-6


def test_herding_is_exact_and_ties_go_to_the_lower() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        vectors = rng.normal(size=(30, 3)).astype(np.float32)
        if seed % 2:
            vectors = rng.integers(-2, 3, (32, 2)).astype(np.float16)
        order = next(herding(Points(vectors), [(np.arange(len(vectors)), 20)]))
        assert order.tolist() == naive_herding(vectors, 20)
    assert next(herding(Points(np.ones((5, 2), np.float32)), [(np.arange(5), 3)])).tolist() == [0, 1, 2]


def test_herding_takes_no_point_twice_beyond_the_range_of_float32() -> None:
    vectors = np.repeat([3e38, -3e38], 10)[:, None].astype(np.float32) * np.ones(3, np.float32)
    (order,) = herding(Points(vectors), [(np.arange(20), 14)])
    assert len(set(order.tolist())) == 14


def test_shares_of_herding_make_up_for_each_other() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(600, 8)).astype(np.float32)

    def error(ids: NDArray[np.int64]) -> float:
        return float(np.linalg.norm(vectors[ids].mean(axis=0) - vectors.mean(axis=0)))

    shares = at_random(600, 60, 4, rng)
    parts = list(herding(Points(vectors), shares))
    assert [part.size for part in parts] == [15] * 4
    assert all(np.isin(part, rows).all() for part, (rows, _) in zip(parts, shares, strict=True))
    apart = [next(herding(Points(vectors).subset(rows), [(np.arange(rows.size), count)])) for rows, count in shares]
    separate = np.concatenate([rows[order] for (rows, _), order in zip(shares, apart, strict=True)])
    drawn = np.mean([error(rng.permutation(600)[:60]) for _ in range(50)])
    assert error(np.concatenate(parts)) < error(separate) < 0.5 * drawn


@pytest.mark.parametrize("relative", [True, False])
def test_discounts_equal_a_naive_loop(relative: bool) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        num, degree = int(rng.integers(2, 30)), int(rng.integers(0, 4))
        degree = min(degree, num - 1)
        near = np.array([rng.permutation(np.delete(np.arange(num), i))[:degree] for i in range(num)], dtype=np.int32)
        discounts = rng.random((num, degree)) if relative else rng.normal(size=(num, degree))
        values = rng.integers(0, 4, num).astype(np.float64) + (seed % 2) * rng.random(num)
        count = int(rng.integers(1, num + 1))
        starts = np.arange(num + 1) * degree
        found = highest_with_discounts(values, count, starts, near.ravel(), discounts.ravel(), relative=relative)
        current, order = values.copy(), list[int]()
        for _ in range(count):
            left = [i for i in range(num) if i not in order]
            best = max(left, key=lambda i: (current[i], -i))
            order.append(best)
            for j, discount in zip(near[best], discounts[best], strict=True):
                current[j] -= discount * (current[best] if relative else 1.0)
        assert found.tolist() == order


def test_counts_of_classes_and_parts_add_up() -> None:
    labels = np.array([3, 0, 0, 3, 3, 3, 3, 3])
    groups = by_class(np.arange(8), 4, labels, "even")
    assert [(ids.tolist(), count) for ids, count in groups] == [([1, 2], 2), ([0, 3, 4, 5, 6, 7], 2)]
    groups = by_class(np.arange(1, 8), 2, labels, "proportional")
    assert [(ids.tolist(), count) for ids, count in groups] == [([1, 2], 1), ([3, 4, 5, 6, 7], 1)]
    assert [(ids.tolist(), count) for ids, count in by_class(np.arange(3), 2, None, "none")] == [([0, 1, 2], 2)]
    parts = at_random(11, 5, 3, np.random.default_rng(0))
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == list(range(11))
    assert sum(count for _, count in parts) == 5
    assert all((np.diff(rows) > 0).all() for rows, _ in parts)
    assert [count for _, count in at_random(5, 2, 9, np.random.default_rng(0))] == [1, 1]
