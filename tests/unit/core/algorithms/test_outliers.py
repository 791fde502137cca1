"""Distances to the k-th neighbor, and how they stand out."""

from __future__ import annotations

import numpy as np
import pytest

from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.outliers import knn_distance, robust_z


def test_distance_to_the_kth_nearest() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 5)).astype(np.float32) + 100.0
    apart = np.sqrt(((vectors[:, None].astype(np.float64) - vectors) ** 2).sum(axis=2))
    np.testing.assert_allclose(knn_distance(Points(vectors), 4), np.sort(apart, axis=1)[:, 4], rtol=1e-4)
    drawn = np.random.default_rng(3).permutation(300)[:50]
    np.fill_diagonal(apart, np.inf)
    expected = np.sort(apart[:, drawn], axis=1)[:, 3]
    np.testing.assert_allclose(knn_distance(Points(vectors), 4, num_reference=50, seed=3), expected, rtol=1e-4)


def test_few_samples_have_fewer_neighbors() -> None:
    assert knn_distance(Points(np.ones((1, 3)))).tolist() == [0.0]
    np.testing.assert_allclose(knn_distance(Points(np.array([[0.0], [2.0]]))), [2.0, 2.0], rtol=1e-6)


def test_an_outlier_stands_out_in_its_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    vectors = rng.normal(size=(400, 3)) * np.where(labels, 10.0, 1.0)[:, None]
    vectors[7] = 15.0  # usual in class 1
    distances = knn_distance(Points(vectors), 5)
    assert robust_z(distances, labels).argmax() == 7
    assert robust_z(distances).argmax() != 7


def test_z_of_equal_values_and_of_small_classes() -> None:
    assert robust_z(np.full(5, 3.0)).tolist() == [0.0] * 5
    values = np.append(np.zeros(30), 6.2)
    assert robust_z(values)[30] == pytest.approx(31.0)
    labels = np.append(np.zeros(30, np.int64), 1)
    assert robust_z(values, labels)[30] == pytest.approx(31.0)
    assert not robust_z(values, labels)[:30].any()
