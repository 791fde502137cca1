"""Last-layer gradients: inner products and distances without the outer products, and ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core.bases.gradients import Gradients, first_largest


def random_gradients(num: int, num_classes: int, num_inputs: int | None, seed: int = 0) -> Gradients:
    rng = np.random.default_rng(seed)
    errors = rng.dirichlet(np.ones(num_classes), size=num) - np.eye(num_classes)[rng.integers(0, num_classes, num)]
    inputs = None if num_inputs is None else rng.normal(size=(num, num_inputs)).astype(np.float32)
    return Gradients(errors.astype(np.float32), inputs)


def outer_products(gradients: Gradients) -> NDArray[Any]:
    """Return the gradients of weight and bias as vectors, one loop per number."""
    rows = []
    for number, error in enumerate(gradients.errors.astype(float)):
        inputs = [] if gradients.inputs is None else gradients.inputs[number].astype(float).tolist()
        rows.append([e * h for e in error.tolist() for h in (*inputs, 1.0)])
    return np.array(rows)


@pytest.mark.parametrize("num_inputs", [None, 1, 7])
@pytest.mark.parametrize("num", [1, 5, 300])
def test_products_agree_with_the_outer_products(num: int, num_inputs: int | None) -> None:
    gradients = random_gradients(num, 4, num_inputs)
    explicit = outer_products(gradients)
    gram = explicit @ explicit.T
    everything = slice(None)
    assert gradients.gram(everything, everything) == pytest.approx(gram, abs=1e-12)
    assert gradients.gram(slice(0, 1), slice(0, 3)) == pytest.approx(gram[:1, :3], abs=1e-12)
    assert gradients.squared_norms() == pytest.approx(np.diag(gram))
    features = gradients.features()
    assert features @ features.T == pytest.approx(gram, abs=1e-9)
    total = gradients.total()
    assert total.ravel() == pytest.approx(explicit.sum(axis=0), abs=1e-12)
    assert gradients.products(total) == pytest.approx(explicit @ explicit.sum(axis=0), abs=1e-10)
    layer = np.random.default_rng(1).normal(size=total.shape)
    inputs = np.zeros((num, 0)) if gradients.inputs is None else gradients.inputs
    logits = np.concatenate([inputs, np.ones((num, 1))], axis=1) @ layer.T
    assert gradients.logit_changes(layer) == pytest.approx(logits)


@pytest.mark.parametrize("num_inputs", [None, 3])
def test_distances_are_euclidean_up_to_one_factor(num_inputs: int | None) -> None:
    gradients = random_gradients(300, 4, num_inputs)
    explicit = outer_products(gradients)
    expected = np.sqrt(((explicit[:, None] - explicit) ** 2).sum(axis=2))
    distances = gradients.distances()
    assert distances.dtype == np.float32
    assert 0.0 < distances.max() <= 1.0
    assert distances * (expected.max() / distances.max()) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (distances == distances.T).all()


def test_equal_gradients_are_at_distance_zero() -> None:
    one = random_gradients(1, 513, 129)
    assert one.inputs is not None
    many = Gradients(np.repeat(one.errors, 600, axis=0), np.repeat(one.inputs, 600, axis=0))
    assert not many.distances().any()
    assert not Gradients(np.zeros((3, 2))).distances().any()


def test_huge_inputs_overflow_nowhere() -> None:
    gradients = Gradients(
        np.array([[0.5, -0.5], [-0.5, 0.5], [0.1, -0.1]], np.float32), np.full((3, 2), 3e38, np.float32)
    )
    distances = gradients.distances()
    assert np.isfinite(distances).all()
    assert distances[0, 1] == distances.max() > distances[0, 2] > 0.0
    assert np.isfinite(gradients.features()).all()
    assert np.isfinite(gradients.products(gradients.total())).all()


def test_features_have_no_more_numbers_than_samples() -> None:
    assert random_gradients(50, 4, None).features().shape == (50, 4)
    assert random_gradients(50, 4, 5).features().shape == (50, 24)
    assert random_gradients(20, 4, 5).features().shape == (20, 20)
    same = Gradients(np.tile([[0.5, -0.5]], (4, 1)), np.ones((4, 9)))  # a Gram matrix of rank 1
    assert same.features() @ same.features().T == pytest.approx(np.full((4, 4), 5.0), rel=1e-9)
    assert not Gradients(np.zeros((3, 2)), np.ones((3, 9))).features().any()


def test_the_first_of_equal_values_are_taken() -> None:
    assert first_largest(np.zeros(5), 2).tolist() == [0, 1]
    assert first_largest(np.array([-np.inf, 2.0, 1.0, 2.0 + 1e-15]), 1).tolist() == [1]
    assert first_largest(np.array([-np.inf, 1.0, 3.0, 1.0 + 1e-15, 2.0]), 3).tolist() == [1, 2, 4]
    assert first_largest(np.array([1.0, 2.0, 1.5]), 2).tolist() == [1, 2]
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, 5, size=12).astype(float)
        count = int(rng.integers(1, 13))
        best = sorted(range(12), key=lambda position: (-values[position], position))[:count]
        assert first_largest(values, count).tolist() == sorted(best)
