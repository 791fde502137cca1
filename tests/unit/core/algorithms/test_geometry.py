"""Distances, neighbors, clusters and centers against naive computations, in blocks of any size.

Shapes: N vectors, d numbers each, k neighbors or clusters.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core.algorithms import geometry
from rayprune.core.algorithms.geometry import (
    Points,
    Standardized,
    assign,
    class_center,
    cosine_distances,
    k_means,
    largest_cosines_before,
    nearest,
    nearest_cosines,
    nearest_neighbors,
    rows_by_label,
)

# Few distinct coordinates, so that distances tie and vectors repeat.
grids = st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(0, 10**6))
blocks = pytest.mark.parametrize("block", [1, 3, 7, 1024])


def grid(shape: tuple[int, int, int], dtype: Any = np.float16) -> NDArray[Any]:
    num, width, seed = shape
    return np.random.default_rng(seed).integers(-2, 3, (num, width)).astype(dtype)


def distances(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float32]:
    """All distances from differences, in float32."""
    differences = left[:, None].astype(np.float64) - right[None].astype(np.float64)
    return np.sqrt(np.square(differences).sum(axis=2)).astype(np.float32)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the sizes of all blocks."""

    def set_sizes(block: int) -> None:
        monkeypatch.setattr(geometry, "_COLUMNS", block)
        monkeypatch.setattr(geometry, "_BLOCK_NUMBERS", 4 * block)
        monkeypatch.setattr(geometry, "_MEDIAN_NUMBERS", 4 * block)

    return set_sizes


@blocks
@pytest.mark.parametrize("count", [1, 4, 100])
def test_neighbors_are_exact_and_tied_ones_are_the_lower(small: Any, block: int, count: int) -> None:
    small(block)
    for seed in range(30):
        vectors = grid((seed + 1, 1 + seed % 3, seed), np.float32)
        if seed % 2:
            vectors += np.random.default_rng(seed).normal(size=vectors.shape).astype(np.float32)
        ids, found = nearest_neighbors(Points(vectors), count)
        expected = distances(vectors, vectors)
        np.fill_diagonal(expected, np.inf)
        order = np.argsort(expected, axis=1, kind="stable")[:, : min(count, seed)]
        assert ids.tolist() == order.tolist()
        assert found.tolist() == np.take_along_axis(expected, order, axis=1).tolist()


@blocks
def test_the_nearest_of_several(small: Any, block: int) -> None:
    small(block)
    for seed in range(20):
        left, right = grid((9, 2, seed)).astype(float), grid((1 + seed, 2, seed + 99)).astype(float)
        where, found = nearest(left, right)
        expected = distances(left, right)
        assert where.tolist() == expected.argmin(axis=1).tolist()
        assert found.tolist() == expected.min(axis=1).tolist()
        ids, same = assign(Points(left), right)
        assert (ids.tolist(), same.tolist()) == (where.tolist(), found.tolist())


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_equal_vectors_are_at_distance_0_and_equally_far_from_others(scale: float) -> None:
    rng = np.random.default_rng(0)
    half = (rng.normal(size=(40, 37)) * scale + 5 * scale).astype(np.float32)
    ids, found = nearest_neighbors(Points(np.concatenate([half, half])), 3)
    assert ids[:40, 0].tolist() == list(range(40, 80))
    assert not found[:, 0].any()
    assert (found[:, 1] > 0).all()
    # The two copies of the next vector: the same distance, the lower id first.
    assert (found[:, 1] == found[:, 2]).all()
    assert (ids[:, 2] == ids[:, 1] + 40).all()


def test_all_equal_vectors_have_the_lowest_others_as_neighbors() -> None:
    ids, found = nearest_neighbors(Points(np.full((3000, 5), 0.1, np.float32)), 2)
    assert ids[0].tolist() == [1, 2]
    assert ids[1].tolist() == [0, 2]
    assert (ids[2:] == [0, 1]).all()
    assert not found.any()


def test_near_vectors_far_from_the_origin_keep_their_order() -> None:
    """Products of matrices in float32 would lose distances of 1e-3 at length 100."""
    line = 100.0 + 0.001 * np.arange(50)
    vectors = np.stack([line, np.full(50, 100.0)], axis=1).astype(np.float32)
    ids, _ = nearest_neighbors(Points(vectors), 2)
    assert all(set(ids[i]) == {i - 1, i + 1} for i in range(1, 49))


def test_numbers_at_the_end_of_float32_work() -> None:
    vectors = np.array([[3e38, 3e38], [-3e38, -3e38], [3e38, 2.9e38]], np.float32)
    ids, found = nearest_neighbors(Points(vectors), 1)
    assert ids[:, 0].tolist() == [2, 0, 0] or ids[:, 0].tolist() == [2, 2, 0]
    assert np.isfinite(found).all()
    assert Points(vectors).distances_to(Points(vectors).mean()).max() == np.finfo(np.float32).max


def test_points_of_some_rows_and_of_unit_length() -> None:
    array = np.array([[3, 4], [0, 0], [0, 2], [5, 0]], np.float16)
    points = Points(array, np.array([1, 2, 3]))
    assert len(points) == 3
    assert points.mean().tolist() == [5 / 3, 2 / 3]
    assert points.subset(np.array([0, 2])).ids.tolist() == [1, 3]
    assert points.as_unit().read(slice(0, 3)).tolist() == [[0, 0], [0, 1], [1, 0]]
    assert Points(array, np.arange(4)).ids.tolist() == Points(array).ids.tolist() == [0, 1, 2, 3]
    assert points.distances_to(np.array([0.0, 2.0])).tolist() == [2.0, 0.0, np.float32(np.sqrt(29))]


def test_cosines_of_neighbors_and_of_zeros() -> None:
    vectors = np.array([[1, 0], [2, 0], [1, 1], [0, 0], [0, 0]], np.float32)
    ids, cosines = nearest_cosines(Points(vectors), 2)
    assert ids[0].tolist() == [1, 2]
    assert cosines[0].tolist() == pytest.approx([1.0, np.sqrt(0.5)])
    assert not cosines[3:].any()


@blocks
def test_cosines_before(small: Any, block: int) -> None:
    small(block)
    vectors = np.random.default_rng(3).normal(size=(23, 4)).astype(np.float32)
    vectors[7] = vectors[3] * 2
    order = np.random.default_rng(4).permutation(23)[:20]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [max([0.0, *(float(unit[j] @ unit[i]) for i in order[:place])]) for place, j in enumerate(order)]
    assert largest_cosines_before(Points(vectors, unit=True), order).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_window_bounds_the_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_COLUMNS", 2)
    monkeypatch.setattr(geometry, "_WINDOW", 2)
    vectors = np.eye(8, dtype=np.float32)
    vectors[7] = vectors[0]
    vectors[5] = vectors[3]
    found = largest_cosines_before(Points(vectors, unit=True), np.arange(8))
    assert found[5] == 1.0
    assert found[7] == 0.0


def test_the_example_of_cosine_distances() -> None:
    angles = np.radians([0, 30, 50, 90])
    points = Points(np.stack([np.cos(angles), np.sin(angles)], axis=1), unit=True)
    found = cosine_distances(points, np.array([[2.0, 0.0], [0.0, 0.5]]))
    assert found.tolist() == pytest.approx([0, 0.133975, 0.233956, 0], abs=1e-6)
    assert found[0] == 0.0


@blocks
def test_k_means_finds_separate_clusters_and_is_reproducible(small: Any, block: int) -> None:
    small(block)
    rng = np.random.default_rng(5)
    corners = np.array([[0, 0], [10, 0], [0, 10], [10, 10]], np.float32)
    vectors = (corners[np.arange(200) % 4] + rng.normal(scale=0.3, size=(200, 2))).astype(np.float32)
    centers = k_means(Points(vectors), 4, np.random.default_rng(0))
    clusters, _ = assign(Points(vectors), centers)
    assert len({(int(a), int(b)) for a, b in zip(clusters, np.arange(200) % 4, strict=True)}) == 4
    for cluster in range(4):
        assert centers[cluster] == pytest.approx(vectors[clusters == cluster].mean(axis=0), abs=1e-5)
    again = k_means(Points(vectors), 4, np.random.default_rng(0))
    assert np.array_equal(centers, again)


def test_a_round_of_lloyd_never_raises_the_cost() -> None:
    vectors = np.random.default_rng(6).normal(size=(300, 3)).astype(np.float32)
    costs = []
    for rounds in range(8):
        centers = k_means(Points(vectors), 7, np.random.default_rng(1), rounds)
        costs.append(float(np.square(assign(Points(vectors), centers)[1].astype(float)).sum()))
    assert all(after <= before + 1e-3 for before, after in pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]


def test_k_means_of_fewer_or_equal_points() -> None:
    assert k_means(Points(np.ones((1, 2), np.float32)), 5, np.random.default_rng(0)).tolist() == [[1, 1]]
    same = k_means(Points(np.full((50, 2), 3.0, np.float16)), 4, np.random.default_rng(0))
    assert (same == 3.0).all()


def test_k_means_is_fitted_on_a_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_FIT_ROWS", 5)
    monkeypatch.setattr(geometry, "_SEED_ROWS", 2)
    vectors = np.random.default_rng(8).normal(size=(500, 2)).astype(np.float32)
    drawn = np.sort(np.random.default_rng(9).permutation(500)[:15])
    (center,) = k_means(Points(vectors), 1, np.random.default_rng(9), 3)
    assert center == pytest.approx(vectors[np.sort(np.random.default_rng(9).permutation(500)[:5])].mean(axis=0))
    centers = k_means(Points(vectors), 3, np.random.default_rng(9))
    clusters, _ = assign(Points(vectors[drawn]), centers)
    for cluster in np.unique(clusters):
        assert centers[cluster] == pytest.approx(vectors[drawn][clusters == cluster].mean(axis=0), abs=1e-5)


@blocks
@pytest.mark.parametrize("center", ["median", "mean"])
def test_class_centers(small: Any, block: int, center: Any) -> None:
    small(block)
    vectors = np.random.default_rng(2).normal(size=(21, 5)).astype(np.float16)
    rows = np.array([0, 4, 5, 20])
    expected = getattr(np, center)(vectors[rows].astype(np.float64), axis=0)
    assert class_center(vectors, rows, center) == pytest.approx(expected)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_rows_by_label(labels: list[int]) -> None:
    groups = list(rows_by_label(np.array(labels)))
    assert [labels[rows[0]] for rows in groups] == sorted(set(labels))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(labels)))
    assert all((np.diff(rows) > 0).all() and len({labels[row] for row in rows}) == 1 for rows in groups)


def test_standardized_columns() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 4)) * [1, 100, 1e-3, 0] + [0, 1e6, 5, 7]
    values = Standardized(vectors).read(slice(None))
    np.testing.assert_allclose(np.median(values, axis=0), 0, atol=1e-9)
    np.testing.assert_allclose((values**2).mean(axis=0), [0.25, 0.25, 0.25, 0], rtol=0.2)


def test_one_huge_value_does_not_change_the_scale_of_the_others() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(1_000, 4))
    vectors[:, 3] = rng.random(1_000) < 0.1  # equal quartiles
    expected = Standardized(vectors).read(slice(1, None))
    huge = vectors.copy()
    huge[0, :3] = 1e9
    np.testing.assert_allclose(Standardized(huge).read(slice(1, None)), expected, rtol=0.02, atol=0.01)
