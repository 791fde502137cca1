"""The model of label noise: expectation maximization, recovery of known noise, degenerate data, the confident joint."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rayprune.core.audit.noise_model import NoiseModel, confident_joint, fit_noise


def fitted(probs: np.ndarray, labels: np.ndarray) -> NoiseModel:
    return fit_noise(probs, labels, np.random.default_rng(0))


def random_data(num: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random probabilities, and labels that follow them."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.5), size=num)
    labels = np.array([rng.choice(classes, p=row) for row in probs])
    return probs, labels


def simulated(transition: np.ndarray, num: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Calibrated probabilities q (N, C), true classes drawn from them, and given labels drawn by the transition."""
    rng, classes = np.random.default_rng(seed), len(transition)
    concentrations = np.full((num, classes), 0.05)
    concentrations[np.arange(num), rng.integers(classes, size=num)] = 2.0
    probs = rng.gamma(concentrations) + 1e-9
    probs /= probs.sum(axis=1, keepdims=True)
    true = (probs.cumsum(axis=1) < rng.random((num, 1))).sum(axis=1).clip(max=classes - 1)
    given = (transition[true].cumsum(axis=1) < rng.random((num, 1))).sum(axis=1).clip(max=classes - 1)
    return probs, true, given


def symmetric(rate: float, classes: int = 10) -> np.ndarray:
    transition = np.full((classes, classes), rate / (classes - 1))
    np.fill_diagonal(transition, 1 - rate)
    return transition


def pairs(rate: float, classes: int = 10) -> np.ndarray:
    """Each even class is labeled as the next one with this probability; odd classes are always right."""
    transition = np.eye(classes)
    for first in range(0, classes, 2):
        transition[first, first], transition[first, first + 1] = 1 - rate, rate
    return transition


def naive_em(probs: np.ndarray, labels: np.ndarray, sharpness: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The module's formulas in loops: the log-likelihood per sample, T and the joint after 60 iterations."""
    num, classes = probs.shape
    likely = [max(range(classes), key=lambda t, row=row: row[t]) for row in probs.tolist()]
    anchors, sizes = [], []
    for t in range(classes):
        predicted = [i for i in range(num) if likely[i] == t]
        surest = sorted(predicted, key=lambda i, t=t: -probs[i, t])[: max(50, len(predicted) // 10)]
        sizes.append(len(predicted))
        frequencies = [sum(labels[i] == y for i in surest) / max(1, len(surest)) for y in range(classes)]
        unpredicted = [0.8 if t == y else 0.2 / (classes - 1) for y in range(classes)]
        anchors.append(frequencies if surest else unpredicted)
    right, chance = np.mean(np.array(likely) == labels), np.bincount(labels).max() / num
    if right - chance < 0.4 * (1 - chance):
        anchors = [[0.8 if t == y else 0.2 / (classes - 1) for y in range(classes)] for t in range(classes)]
        sizes = [0] * classes
    beliefs = [[probability**sharpness for probability in row] for row in probs.tolist()]
    beliefs = [[belief / sum(row) for belief in row] for row in beliefs]
    transition = anchors
    for _ in range(60):
        likelihood, counts = 0.0, [[0.0] * classes for _ in range(classes)]
        for row, y in zip(beliefs, labels.tolist(), strict=True):
            joint = [row[t] * transition[t][y] for t in range(classes)]
            likelihood += math.log(sum(joint)) / num
            for t in range(classes):
                counts[t][y] += joint[t] / sum(joint)
        for t in range(classes):
            row = [counts[t][y] + sizes[t] * anchors[t][y] + 1 / classes for y in range(classes)]
            transition = [*transition[:t], [each / sum(row) for each in row], *transition[t + 1 :]]
    return likelihood, np.array(transition), np.array(counts).T / num


@pytest.mark.parametrize(("num", "classes"), [(60, 3), (41, 2), (80, 5), (3, 4)])
def test_the_fit_is_that_of_a_transcription_in_loops(num: int, classes: int) -> None:
    probs, labels = random_data(num, classes, seed=num)
    model = fitted(probs, labels)
    likelihood, transition, joint = naive_em(probs, labels, model.sharpness)
    np.testing.assert_allclose(model.transition, transition, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(model.joint, joint, rtol=1e-6, atol=1e-9)
    assert model.noise_rate == pytest.approx(1 - np.trace(joint))
    others = [naive_em(probs, labels, sharpness)[0] for sharpness in (1.0, 1.5, 2.5, 4.0, 6.0)]
    assert likelihood >= max(others) - 2e-3  # the search stops within 2 % of a best one
    posterior = probs**model.sharpness * transition[:, labels].T
    np.testing.assert_allclose(
        model.posterior(probs, labels), posterior / posterior.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("transition", [symmetric(0.1), symmetric(0.4), pairs(0.3)], ids=["10 %", "40 %", "pairs"])
@pytest.mark.parametrize("flattened", [1.0, 2.0])
def test_known_noise_is_recovered(transition: np.ndarray, flattened: float) -> None:
    probs, true, given = simulated(transition)
    flat = probs ** (1 / flattened)
    model = fitted((flat / flat.sum(axis=1, keepdims=True)).astype(np.float32), given)
    assert model.noise_rate == pytest.approx((given != true).mean(), abs=0.01)
    assert model.sharpness == pytest.approx(flattened, rel=0.1)
    np.testing.assert_allclose(model.transition, transition, atol=0.07)  # 200 anchors in each class
    joint = np.zeros_like(transition)
    np.add.at(joint, (given, true), 1 / true.size)
    np.testing.assert_allclose(model.joint, joint, atol=0.005)


@pytest.mark.parametrize(
    "transition", [pairs(0.35), np.array([[0.65, 0.35], [0.0, 1.0]])], ids=["pairs", "two classes"]
)
def test_noise_that_the_network_predicts_is_found(transition: np.ndarray) -> None:
    """The predictions are those of the given labels, so that without noise they would be right as well."""
    rng, classes = np.random.default_rng(0), len(transition)
    true = rng.integers(classes, size=5_000)
    given = (transition[true].cumsum(axis=1) < rng.random((5_000, 1))).sum(axis=1).clip(max=classes - 1)
    logits = np.log(0.98 * transition[true] + 0.02 / classes) + 0.2 * rng.normal(size=(5_000, classes))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    model = fitted(probs, given)
    assert model.noise_rate == pytest.approx((given != true).mean(), abs=0.04)
    suspects = 1 - model.posterior(probs, given)[np.arange(5_000), given] >= 0.5
    assert (given != true)[suspects].mean() > 0.9
    assert suspects[given != true].mean() > 0.7


def test_the_posterior_is_calibrated() -> None:
    probs, true, given = simulated(symmetric(0.2))
    wrong = 1 - fitted(probs, given).posterior(probs, given)[np.arange(true.size), given]
    for low, high in ((0.0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
        rows = (wrong >= low) & (wrong < high)
        assert rows.sum() > 200
        assert (given != true)[rows].mean() == pytest.approx(wrong[rows].mean(), abs=0.05)


def test_without_noise_nothing_is_sharpened() -> None:
    probs, _, given = simulated(np.eye(10))
    model = fitted(probs, given)
    assert model.sharpness == pytest.approx(1.0, abs=0.03)
    assert model.noise_rate < 0.005
    np.testing.assert_allclose(model.transition, np.eye(10), atol=0.02)


def test_rows_with_nan_are_left_out() -> None:
    probs, labels = random_data(200, 3)
    with_nan, more = np.concatenate([probs, np.full((50, 3), np.nan)]), np.concatenate([labels, np.zeros(50, int)])
    with_nan[-1, :2] = 0.5
    order = np.random.default_rng(0).permutation(250)
    model, expected = fitted(with_nan[order], more[order]), fitted(probs, labels)
    np.testing.assert_allclose(model.transition, expected.transition, rtol=1e-6)
    np.testing.assert_allclose(model.joint, expected.joint, rtol=1e-6)
    assert model.joint.sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(confident_joint(with_nan, more), confident_joint(probs, labels))


def test_a_class_without_samples() -> None:
    probs, true, given = simulated(symmetric(0.2, 4), num=4_000)
    absent = np.insert(probs, 2, 1e-6, axis=1)
    model = fitted(absent, given + (given >= 2))
    assert model.noise_rate == pytest.approx((given != true).mean(), abs=0.03)
    assert model.joint[2].sum() == 0.0
    assert model.joint[:, 2].sum() < 1e-3
    np.testing.assert_allclose(model.transition.sum(axis=1), 1.0)


def test_two_classes() -> None:
    transition = np.array([[0.9, 0.1], [0.3, 0.7]])
    probs, true, given = simulated(transition)
    model = fitted(probs, given)
    np.testing.assert_allclose(model.transition, transition, atol=0.04)
    assert model.noise_rate == pytest.approx((given != true).mean(), abs=0.02)


def test_certain_predictions_and_a_single_sample() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    model = fitted(np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2, 1, 1]], labels)
    assert model.joint[0, 1] == pytest.approx(1 / 8, abs=1e-3)
    assert model.noise_rate == pytest.approx(1 / 8, abs=1e-3)
    one = fitted(np.array([[0.9, 0.1]]), np.array([0]))
    assert one.joint.sum() == pytest.approx(1.0)
    assert 0 <= one.noise_rate < 0.1


def test_the_order_of_the_samples_is_irrelevant() -> None:
    probs, labels = random_data(300, 4)
    order = np.random.default_rng(1).permutation(300)
    one, other = fitted(probs, labels), fitted(probs[order], labels[order])
    np.testing.assert_allclose(one.transition, other.transition, rtol=1e-9)
    np.testing.assert_allclose(
        one.posterior(probs, labels)[order], other.posterior(probs[order], labels[order]), rtol=1e-6
    )


def test_very_many_samples_are_fitted_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, _, given = simulated(symmetric(0.2, 5))
    whole = fitted(probs, given)
    monkeypatch.setattr("rayprune.core.audit.noise_model._FIT_NUMBERS", 5 * 8_000)
    part = fitted(probs, given)
    assert part.noise_rate != whole.noise_rate
    assert part.noise_rate == pytest.approx(whole.noise_rate, abs=0.02)
    np.testing.assert_array_equal(part.transition, fitted(probs, given).transition)


def test_the_confident_joint_of_a_small_example() -> None:
    # The thresholds are (0.9 + 0.6 + 0.3)/3 = 0.6 for class 0, and (0.8 + 0.4)/2 = 0.6 for class 1.
    first = [0.9, 0.6, 0.3, 0.2, 0.6]
    probs = np.stack([first, 1 - np.array(first)], axis=1)
    labels = np.array([0, 0, 0, 1, 1])
    # Label 0 is counted as 0, 0 and 1; label 1 as 1 and 0.
    np.testing.assert_allclose(confident_joint(probs, labels), [[0.4, 0.2], [0.2, 0.2]])


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_confident_joint_is_that_of_cleanlab(classes: int) -> None:
    count = pytest.importorskip("cleanlab.count")
    probs, _, given = simulated(symmetric(0.2, classes), num=2_000)
    counts = count.compute_confident_joint(given, probs, calibrate=False)
    expected = counts / counts.sum(axis=1, keepdims=True) * (np.bincount(given) / given.size)[:, None]
    np.testing.assert_allclose(confident_joint(probs, given), expected, rtol=1e-6)


def test_the_confident_joint_of_a_class_without_samples() -> None:
    probs = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    joint = confident_joint(probs, np.array([0, 0, 2]))
    np.testing.assert_allclose(joint, [[2 / 3, 0, 0], [0, 0, 0], [0, 0, 1 / 3]])
