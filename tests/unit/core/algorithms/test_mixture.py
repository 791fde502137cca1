"""Mixtures of two distributions: the parameters of simulated numbers, a naive EM, and degenerate numbers.

Shapes: N numbers.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rayprune.core.algorithms.mixture import MAX_BINS, Mixture, fit_mixture
from rayprune.errors import DataError


def two_normals(num: int, share: float = 0.3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < share, rng.normal(2.0, 0.7, num), rng.normal(0.2, 0.1, num))


def naive_em(values: np.ndarray, num_iterations: int) -> tuple[list[float], list[float], list[float], float]:
    """The textbook's loops over normal distributions, from a start at the median; and the likelihood."""
    halves = np.sort(values)[: len(values) // 2], np.sort(values)[len(values) // 2 :]
    weights, means, variances = [0.5, 0.5], [half.mean() for half in halves], [half.var() for half in halves]
    for _ in range(num_iterations):
        density = [
            [w * stats.norm.pdf(x, m, v**0.5) for w, m, v in zip(weights, means, variances, strict=True)]
            for x in values
        ]
        posterior = np.array([[d / sum(row) for d in row] for row in density])
        for k in range(2):
            r = posterior[:, k]
            weights[k], means[k] = r.mean(), (r * values).sum() / r.sum()
            variances[k] = (r * (values - means[k]) ** 2).sum() / r.sum()
    return weights, means, variances, float(np.mean(np.log(np.sum(density, axis=1))))


def test_a_fit_is_that_of_a_naive_em() -> None:
    values = two_normals(300)
    weights, means, variances, _ = naive_em(values, 60)
    mixture = fit_mixture(values)
    assert mixture.weights == pytest.approx(weights, abs=1e-4)
    assert mixture.means == pytest.approx(means, abs=1e-4)
    assert mixture.variances == pytest.approx(variances, rel=1e-3)
    posterior = mixture.posterior(values)
    joint = [w * stats.norm.pdf(values, m, v**0.5) for w, m, v in zip(weights, means, variances, strict=True)]
    above = values > means[0]
    assert posterior[above] == pytest.approx((joint[1] / (joint[0] + joint[1]))[above], abs=1e-3)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6])
def test_the_parameters_of_simulated_numbers_are_found(share: float) -> None:
    mixture = fit_mixture(two_normals(50_000, share))
    assert mixture.weights[1] == pytest.approx(share, abs=0.01)
    assert mixture.means == pytest.approx([0.2, 2.0], abs=0.05)
    assert np.sqrt(mixture.variances) == pytest.approx([0.1, 0.7], abs=0.05)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_beta_distributions_fit_skewed_numbers_where_normal_ones_do_not(share: float) -> None:
    rng = np.random.default_rng(1)
    values = np.where(rng.random(20_000) < share, rng.beta(8, 1, 20_000), rng.beta(1, 3, 20_000))
    beta, normal = fit_mixture(values, "beta"), fit_mixture(values)
    assert beta.weights[1] == pytest.approx(share, abs=0.03)
    assert abs(normal.weights[1] - share) > abs(beta.weights[1] - share)
    assert beta.means == pytest.approx([1 / 4, 8 / 9], abs=0.05)
    density = [stats.beta.pdf(values, 1, 3) * (1 - share), stats.beta.pdf(values, 8, 1) * share]
    above = values > beta.means[0]
    error = beta.posterior(values)[above] - (density[1] / sum(density))[above]
    assert np.abs(error).mean() < 0.05


def test_more_numbers_than_bins_give_nearly_the_same_fit() -> None:
    values = two_normals(MAX_BINS)
    exact, binned = fit_mixture(values), fit_mixture(np.concatenate([values, values]))
    for name in ("weights", "means", "variances"):
        assert getattr(binned, name) == pytest.approx(getattr(exact, name), rel=1e-3)


def test_the_order_of_numbers_and_their_unit_change_nothing() -> None:
    values = two_normals(10_000)
    mixture = fit_mixture(values)
    assert fit_mixture(np.random.default_rng(3).permutation(values)) == mixture
    scaled = fit_mixture(values * 1e30)
    assert scaled.weights == pytest.approx(mixture.weights, abs=1e-6)
    assert scaled.means == pytest.approx([mean * 1e30 for mean in mixture.means], rel=1e-5)


def test_the_posterior_never_falls() -> None:
    mixture = Mixture((0.5, 0.5), (0.0, 1.0), (0.01, 4.0))
    posterior = mixture.posterior(np.linspace(-5, 5, 200_000))
    assert (np.diff(posterior) >= 0).all()
    assert posterior[-1] == pytest.approx(1.0)
    assert np.isnan(mixture.posterior(np.array([np.nan, 1.0]))).tolist() == [True, False]


@pytest.mark.parametrize("family", ["normal", "beta"])
@pytest.mark.parametrize("values", [[0.5], [0.25] * 9, [0.1] * 100_000, [0.0] * 3, [1.0] * 5000])
def test_equal_numbers_are_all_of_the_lower_component(values: list[float], family: Any) -> None:
    mixture = fit_mixture(np.array(values), family)
    assert mixture.weights == (1.0, 0.0)
    assert mixture.separation == 0.0
    assert mixture.posterior(np.array(values)).max() == 0.0


@pytest.mark.parametrize("family", ["normal", "beta"])
@pytest.mark.parametrize("values", [[0.0, 1.0], [0.2, 0.3], [0.0] * 9999 + [1.0], [0.1] * 50 + [0.9] * 50])
def test_two_values_are_two_components(values: list[float], family: Any) -> None:
    mixture = fit_mixture(np.array(values), family)
    assert mixture.weights[1] == pytest.approx(values.count(max(values)) / len(values), abs=1e-3)
    assert mixture.posterior(np.array([min(values), max(values)])) == pytest.approx([0.0, 1.0], abs=1e-6)


def test_huge_numbers_are_fitted() -> None:
    mixture = fit_mixture(np.array([-3e38, 3e38] * 5000, dtype=np.float32))
    assert mixture.means == pytest.approx([-3e38, 3e38])


@pytest.mark.parametrize(
    ("values", "family"), [([], "normal"), ([0.0, np.nan], "normal"), ([np.inf], "normal"), ([0.5, 1.5], "beta")]
)
def test_other_values_are_refused(values: list[float], family: Any) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*: (leave out samples|scale the others)[^\n]*$"):
        fit_mixture(np.array(values), family)


def test_a_million_numbers_take_less_than_two_seconds() -> None:
    values = two_normals(1_000_000).astype(np.float32)
    start = time.process_time()
    fit_mixture(values).posterior(values)
    assert time.process_time() - start < 2.0
