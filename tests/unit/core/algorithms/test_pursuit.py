"""Non-negative orthogonal matching pursuit: a naive transcription, optimality, and ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import nnls

from rayprune.core.algorithms.pursuit import pursue


def naive_pursuit(features: NDArray[Any], target: NDArray[Any], count: int, ridge: float) -> NDArray[Any]:
    """Return the weights of orthogonal matching pursuit, fitted by SciPy's non-negative least squares at each step."""
    num = len(features)
    picked: list[int] = []
    weights = np.zeros(num)
    while np.count_nonzero(weights) < count:
        residual = target - weights @ features
        along = features @ residual
        along[picked] = -np.inf
        if along.max() <= 1e-9:
            break
        picked.append(int(np.argmax(np.round(along, 9))))
        system = np.concatenate([features[picked].T, np.sqrt(ridge) * np.eye(len(picked))])
        weights = np.zeros(num)
        weights[picked] = nnls(system, np.concatenate([target, np.zeros(len(picked))]))[0]
        picked = np.flatnonzero(weights).tolist()
    return weights


@pytest.mark.parametrize("ridge", [5.0, 0.5, 1e-3])
@pytest.mark.parametrize("shape", [(60, 4), (60, 30), (30, 60)])
def test_it_agrees_with_a_naive_pursuit(shape: tuple[int, int], ridge: float) -> None:
    for seed in range(3):
        features = np.random.default_rng(seed).normal(size=shape)
        target = features[:15].sum(axis=0)
        for count in (1, 5, 20):
            expected = naive_pursuit(features, target, count, ridge)
            weights = pursue(features, target, count, ridge)
            assert np.flatnonzero(weights).tolist() == np.flatnonzero(expected).tolist()
            assert weights == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_many_steps_accumulate_no_error() -> None:
    features = np.abs(np.random.default_rng(0).normal(size=(600, 8)))
    target = features.sum(axis=0)
    weights = pursue(features, target, 500, 0.5)
    kept = weights > 0.0
    assert np.count_nonzero(kept) == 500
    own = features[kept]
    assert weights[kept] == pytest.approx(own @ np.linalg.solve(own.T @ own + 0.5 * np.eye(8), target), rel=1e-9)


@pytest.mark.parametrize("ridge", [0.5, 1e-3, 0.0])
@pytest.mark.parametrize("shape", [(80, 3), (80, 40), (40, 80)])
def test_a_finished_pursuit_is_the_optimum_of_non_negative_least_squares(shape: tuple[int, int], ridge: float) -> None:
    for seed in range(3):
        features = np.random.default_rng(seed).normal(size=shape)
        target = np.random.default_rng(seed + 10).normal(size=shape[1]) * 5.0
        weights = pursue(features, target, shape[0], ridge)
        assert weights.min() == 0.0 < weights.max()
        along = features @ (target - weights @ features) - ridge * weights
        tolerance = 1e-6 * np.abs(features @ target).max()
        assert along.max() < tolerance  # no other sample helps
        assert np.abs(along[weights > 0]).max() < tolerance
        system = np.concatenate([features.T, np.sqrt(ridge) * np.eye(shape[0])])
        best = nnls(system, np.concatenate([target, np.zeros(shape[0])]))[1]
        found = np.linalg.norm(np.concatenate([target - weights @ features, np.sqrt(ridge) * weights]))
        assert found == pytest.approx(best, rel=1e-5, abs=1e-5)


def test_it_ends_where_no_vector_helps() -> None:
    assert not pursue(np.zeros((3, 2)), np.ones(2), 2, 0.5).any()
    assert not pursue(np.ones((3, 2)), -np.ones(2), 2, 0.5).any()
    assert not pursue(np.ones((3, 2)), np.zeros(2), 2, 0.5).any()
    weights = pursue(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]]), np.array([4.0, 1.0]), 3, 0.0)
    assert weights == pytest.approx([0.0, 2.0, 0.0], abs=1e-6)


def test_the_first_of_equal_vectors_is_chosen() -> None:
    features = np.tile([[0.1, 0.7, 0.3]], (50, 1))
    assert np.flatnonzero(pursue(features, features.sum(axis=0), 7, 0.5)).tolist() == list(range(7))
