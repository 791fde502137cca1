"""ε-greedy and UCB: moving averages and bounds against plain loops, and what each keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.testing import check_method


def observed(config: dict[str, Any], losses_EN: np.ndarray, seed: int = 0) -> Selector:
    """Return a selector that has seen the losses, before the next epoch; NaN = not visited."""
    selector = Selector(build_method(config), losses_EN.shape[1], len(losses_EN) + 3, seed)
    for epoch, losses in enumerate(losses_EN):
        ids = np.flatnonzero(~np.isnan(losses))
        selector.observe(ids, {"loss": losses[ids]}, epoch)
    return selector


def naive_moments(losses: list[float], rate: float) -> tuple[float, float]:
    mean, variance = losses[0], 0.0
    for loss in losses[1:]:
        variance = (1 - rate) * variance + rate * (loss - mean) ** 2
        mean = (1 - rate) * mean + rate * loss
    return mean, variance


def test_the_small_example_of_ucb() -> None:
    selector = observed({"name": "ucb"}, np.array([[1.0], [2.0]]))
    assert selector.table["variance"][0] == pytest.approx(0.2)
    assert selector.table["mean"][0] == pytest.approx(1.2)
    assert selector.scores()["ucb"][0] == pytest.approx(1.4)
    # Not with the new mean (0.128), and not with the standard deviation (1.6472…).
    assert selector.scores()["ucb"][0] != pytest.approx(1.2 + 0.2 * 0.8**2)


@pytest.mark.parametrize("rate", [0.2, 0.7, 1.0])
def test_averages_are_those_of_a_loop_over_the_visits(rate: float) -> None:
    rng = np.random.default_rng(0)
    losses_EN = np.where(rng.random((7, 30)) < 0.3, np.nan, rng.exponential(size=(7, 30)))
    bound = observed({"name": "ucb", "ema": rate, "exploration": 2.5}, losses_EN)
    greedy = observed({"name": "epsilon_greedy", "ema": rate}, losses_EN)
    for sample in range(30):
        visits = losses_EN[:, sample][~np.isnan(losses_EN[:, sample])].tolist()
        mean, variance = naive_moments(visits, rate)
        assert greedy.scores()["mean"][sample] == pytest.approx(mean, rel=1e-6)
        assert bound.scores()["ucb"][sample] == pytest.approx(mean + 2.5 * variance, rel=1e-5)


def test_ucb_keeps_the_highest_bounds_and_lower_ids_among_equal_ones() -> None:
    losses_EN = np.array([[1.0, 2.0, 1.0, 1.0, 1.9], [1.0, 2.0, 3.0, 1.0, 1.9]])
    # Means 1, 2, 1.4, 1, 1.9 and bounds 1, 2, 2.2, 1, 1.9.
    assert observed({"name": "ucb", "prune_ratio": 0.4}, losses_EN).begin_epoch(2).ids.tolist() == [1, 2, 4]
    assert observed({"name": "ucb", "prune_ratio": 0.2}, losses_EN).begin_epoch(2).ids.tolist() == [0, 1, 2, 4]
    without = {"name": "ucb", "prune_ratio": 0.6, "exploration": 0}
    assert observed(without, losses_EN).begin_epoch(2).ids.tolist() == [1, 4]


def test_epsilon_greedy_draws_exactly_its_share_from_the_rest() -> None:
    losses_EN = np.arange(20.0)[None]
    config = {"name": "epsilon_greedy", "prune_ratio": 0.5, "epsilon": 0.35}  # 10 kept: 7 highest, floor(3.5) drawn
    times, num_seeds = np.zeros(20), 2000
    for seed in range(num_seeds):
        kept = observed(config, losses_EN, seed).begin_epoch(1).codes
        assert kept.sum() == 10
        times += kept
    assert (times[13:] == num_seeds).all()
    expected = 3 / 13
    deviation = 5 * np.sqrt(expected * (1 - expected) / num_seeds)
    assert np.abs(times[:13] / num_seeds - expected).max() < deviation


def test_epsilon_at_its_ends() -> None:
    losses_EN = np.array([[0.5, 3.0, 0.1, 2.0]])
    config = {"name": "epsilon_greedy", "prune_ratio": 0.5, "epsilon": 0.0}
    assert {tuple(observed(config, losses_EN, seed).begin_epoch(1).ids) for seed in range(5)} == {(1, 3)}
    drawn = {tuple(observed({**config, "epsilon": 1.0}, losses_EN, s).begin_epoch(1).ids) for s in range(100)}
    assert len(drawn) == 6  # all pairs of four samples


def test_an_infinite_variance_does_not_stay() -> None:
    losses_EN = np.array([[0.0, 1.0], [3e38, 1.0], [0.0, 1.0], [0.0, 1.0]])
    selector = observed({"name": "ucb"}, losses_EN)
    assert np.isfinite(selector.table["variance"]).all()
    assert not np.isnan(selector.scores()["ucb"]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "ucb", "ema": 0.0}, r"ema 0\.0 is outside \(0, 1\]: 1 uses the last loss"),
        ({"name": "epsilon_greedy", "ema": 1.1}, r"ema 1\.1 is outside"),
        ({"name": "ucb", "exploration": -1}, r"exploration -1 is outside \[0, 1e6\]: 0 ignores the variance"),
        ({"name": "epsilon_greedy", "epsilon": 2}, r"epsilon 2 is outside \[0, 1\]"),
        ({"name": "ucb", "prune_ratio": 1.0}, r"outside \[0, 1\)"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(options)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_variants_conform(epsilon: float) -> None:
    check_method({"name": "epsilon_greedy", "epsilon": epsilon, "ema": 1.0})
