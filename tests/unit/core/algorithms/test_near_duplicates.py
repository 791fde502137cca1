"""Near-duplicates: the search finds what brute force finds, groups, splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core.algorithms import near_duplicates as module
from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.near_duplicates import ACROSS, NONE, WITHIN, duplicates_of, near_duplicates
from rayprune.errors import ConfigError, DataError


def brute(vectors: NDArray[Any], radius: float, parts: NDArray[Any]) -> tuple[list[int], list[float], list[int]]:
    """Lowest id of each component, distance to the nearest duplicate, and other parts within the radius."""
    vectors = vectors.astype(np.float64)
    num = len(vectors)
    first, nearest, sees = list(range(num)), [np.inf] * num, [0] * num
    pairs = []
    for i in range(num):
        distances = np.sqrt(((vectors - vectors[i]) ** 2).sum(axis=1)).astype(np.float32)
        for j in np.flatnonzero(distances <= np.float32(radius)):
            if i != j:
                pairs.append((i, int(j)))
                nearest[i] = min(nearest[i], float(distances[j]))
                sees[i] |= 1 << int(parts[j]) if parts[j] != parts[i] else 0
    changed = True
    while changed:
        changed = False
        for i, j in pairs:
            low = min(first[i], first[j])
            changed |= first[i] != low or first[j] != low
            first[i] = first[j] = low
    return first, nearest, sees


def check(vectors: NDArray[Any], radius: float, parts: NDArray[Any] | None = None) -> int:
    """Compare the search with brute force; return the number of samples with a duplicate."""
    parts = np.zeros(len(vectors), np.uint8) if parts is None else parts.astype(np.uint8)
    groups = near_duplicates(Points(vectors), radius, parts)
    first, nearest, sees = brute(vectors, radius, parts)
    assert groups.first.tolist() == first
    np.testing.assert_allclose(groups.nearest, nearest, rtol=1e-6)
    assert groups.sees.tolist() == sees
    return int(np.isfinite(groups.nearest).sum())


def crowd(seed: int, num: int, width: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Return clustered vectors, a third of them close to another one, some equal."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(10, width))[rng.integers(10, size=num)] + 0.5 * rng.normal(size=(num, width))
    copies = rng.integers(num, size=num // 3)
    noise = rng.normal(size=(copies.size, width)) / np.sqrt(width)
    vectors[rng.permutation(num)[: copies.size]] = (
        vectors[copies] + rng.choice([0, 0.05, 0.3], (copies.size, 1)) * noise
    )
    return vectors.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("num", "width", "radius"), [(400, 3, 0.1), (600, 70, 0.2), (500, 2, 0.02), (300, 130, 0.4)])
def test_the_search_finds_the_pairs_of_brute_force(num: int, width: int, radius: float, dtype: Any) -> None:
    for seed in range(3):
        vectors = crowd(seed, num, width, dtype)
        parts = np.random.default_rng(seed).integers(3, size=num)
        assert 20 < check(vectors, radius, parts) < num


@pytest.mark.parametrize("radius", [0.0, 0.05, 0.5, 1.0, 3.0, 100.0])
def test_any_radius(radius: float) -> None:
    check(crowd(0, 200, 5), radius, np.arange(200) % 2)


def test_small_blocks_and_many_waiting_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_LEFT", 8), ("_RIGHT", 16), ("_SEPARATE", 50), ("_WAITING", 30), ("_PAIR_NUMBERS", 40)):
        monkeypatch.setattr(module, name, value)
    for seed in range(3):
        check(crowd(seed, 400, 6), 0.3, np.arange(400) % 2)


def test_radius_at_which_pairs_lie() -> None:
    grid = np.stack(np.meshgrid(np.arange(12), np.arange(12)), axis=-1).reshape(-1, 2).astype(np.float32)
    assert check(grid, 1.0) == 144
    assert check(grid, 0.99) == 0
    assert set(near_duplicates(Points(grid), 1.0).first.tolist()) == {0}


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e6, 1e20, 1e30])
def test_any_scale_and_a_far_outlier(scale: float) -> None:
    vectors = crowd(0, 200, 5).astype(np.float64)
    assert check((vectors * scale).astype(np.float32), 0.3 * scale) > 0
    vectors[17] *= 1e9
    assert check((vectors * scale).astype(np.float64), 0.3 * scale) > 0


def test_large_offset() -> None:
    assert check(crowd(1, 200, 5).astype(np.float64) + 1e6, 0.3) > 0


def test_equal_vectors_are_one_group() -> None:
    vectors = np.full((20_000, 4), 0.25, dtype=np.float32)
    vectors[[5, 19_999]] = [[1, 2, 3, 4], [1, 2, 3, 4]]
    groups = near_duplicates(Points(vectors), 0.1)
    expected = np.zeros(20_000, dtype=np.int64)
    expected[[5, 19_999]] = 5
    assert np.array_equal(groups.first, expected)
    assert not groups.nearest.any()


def test_a_dense_group_that_is_not_equal_measures_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = (1.0 + 1e-3 * rng.normal(size=(3_000, 8))).astype(np.float32)
    measured = []
    measure = module._Search._measure
    monkeypatch.setattr(module._Search, "_measure", lambda *a: (measured.append(a[1].size), measure(*a))[1])
    groups = near_duplicates(Points(vectors), 0.5)
    assert not groups.first.any()
    assert sum(measured) < 3_000 * 3_000 / 2 / 20
    apart = vectors[:50].astype(np.float64)[:, None] - vectors
    distances = np.sqrt((apart**2).sum(axis=2))
    distances[np.arange(50), np.arange(50)] = np.inf
    np.testing.assert_allclose(groups.nearest[:50], distances.min(axis=1), rtol=1e-6)


def test_negative_zero_equals_zero() -> None:
    assert near_duplicates(Points(np.array([[0.0, 1.0], [-0.0, 1.0]], np.float32)), 0.0).first.tolist() == [0, 0]


def test_colliding_hashes_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hashes", lambda vectors, _: np.zeros(len(vectors), np.uint64))
    check(crowd(0, 200, 4), 0.2, np.arange(200) % 2)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_few_samples(num: int) -> None:
    vectors = np.ones((num, 3), dtype=np.float32)
    assert check(vectors, 0.1) == (num if num > 1 else 0)
    vectors[0] = 5
    assert check(vectors, 0.1) == (2 if num == 3 else 0)
    assert check(vectors[:, :1], 0.1) == (2 if num == 3 else 0)


def test_zero_vectors_are_equal_and_far_from_unit_vectors() -> None:
    vectors = np.array([[0, 0], [1, 0], [0, 0], [2, 0]], dtype=np.float32)
    assert near_duplicates(Points(vectors, unit=True), 0.5).first.tolist() == [0, 1, 0, 1]


def test_a_chain_is_one_group() -> None:
    rng = np.random.default_rng(0)
    order = rng.permutation(3_000)
    line = np.zeros((3_000, 3), dtype=np.float32)
    line[order, 0] = np.arange(3_000)
    line[order[1_000:], 0] += 5.0
    first = near_duplicates(Points(line), 1.5).first
    assert set(first[order[:1_000]]) == {order[:1_000].min()}
    assert set(first[order[1_000:]]) == {order[1_000:].min()}


def test_the_order_of_rows_does_not_matter() -> None:
    vectors = crowd(2, 2_000, 20)
    order = np.random.default_rng(1).permutation(2_000)
    plain, permuted = near_duplicates(Points(vectors), 0.2), near_duplicates(Points(vectors[order]), 0.2)
    # Row i of the permuted vectors is sample order[i]: the same samples share a group.
    _, groups = np.unique(plain.first[order], return_inverse=True)
    _, others = np.unique(permuted.first, return_inverse=True)
    assert len(set(zip(groups.tolist(), others.tolist(), strict=True))) == groups.max() + 1 == others.max() + 1
    np.testing.assert_array_equal(plain.nearest[order], permuted.nearest)
    again = near_duplicates(Points(vectors), 0.2)
    np.testing.assert_array_equal(again.first, plain.first)


def test_memory_map_and_rows(tmp_path: Path) -> None:
    array = np.memmap(tmp_path / "vectors", dtype=np.float16, mode="w+", shape=(300, 9))
    array[:] = crowd(0, 300, 9)
    rows = np.arange(0, 300, 2)
    groups = near_duplicates(Points(array, rows), 0.3)
    assert groups.first.tolist() == brute(np.asarray(array[rows]), 0.3, np.zeros(150))[0]


def test_splits() -> None:
    angles = np.deg2rad([0, 1, 40, 90, 41, 90, 91, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * 3
    found = duplicates_of(Points(vectors, unit=True), 4, 0.02)
    assert found.of.tolist() == [-1, 0, -1, -1, 2, 3, 3, -1]
    assert found.split.tolist() == [WITHIN, WITHIN, ACROSS, ACROSS, ACROSS, ACROSS, ACROSS, NONE]
    assert found.leaked.tolist() == [2, 3]
    expected = [np.cos(np.deg2rad(1))] * 3 + [1.0, np.cos(np.deg2rad(1)), 1.0, np.cos(np.deg2rad(1)), np.nan]
    np.testing.assert_allclose(found.similarity, expected, atol=1e-6)
    alone = duplicates_of(Points(vectors[:4], unit=True), 4, 0.02)
    assert alone.of.tolist() == [-1, 0, -1, -1]
    assert alone.leaked.size == 0


def test_leakage_is_direct_and_not_along_a_chain() -> None:
    vectors = np.array([[0.0], [1.0], [2.0]], dtype=np.float32)
    found = duplicates_of(Points(vectors), 2, 1.0)
    assert found.of.tolist() == [-1, 0, 0]
    assert found.split.tolist() == [WITHIN, ACROSS, ACROSS]


def test_equal_vectors_in_one_split_are_no_leakage() -> None:
    vectors = np.array([[0.0, 1], [0, 1], [1, 0]], dtype=np.float32)
    assert duplicates_of(Points(vectors), 2, 0.1).split.tolist() == [WITHIN, WITHIN, NONE]


@pytest.mark.parametrize("radius", [-1.0, np.nan, np.inf])
def test_a_wrong_radius_is_refused(radius: float) -> None:
    with pytest.raises(ConfigError, match="at least 0"):
        near_duplicates(Points(np.ones((2, 2))), radius)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(value: float) -> None:
    vectors = np.ones((5, 2))
    vectors[3, 1] = value
    with pytest.raises(DataError, match=r"samples \[3\]"):
        near_duplicates(Points(vectors), 0.1)
