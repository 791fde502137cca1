"""IES: second differences against a loop, the first six losses, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.testing import check_method

EXAMPLE = [0.2, 0.1, 0.05, 0.05, 0.0502, 0.0503, 0.0503]


def selector_of(num_samples: int, num_epochs: int = 12, **options: float) -> Selector:
    return Selector(build_method({"name": "ies", **options}), num_samples, num_epochs)


def naive(losses: list[float]) -> float:
    """Return the mean of the last three absolute second differences; NaN without four of them."""
    differences = [abs(losses[t] - 2 * losses[t - 1] + losses[t - 2]) for t in range(2, len(losses))]
    return sum(differences[-3:]) / 3 if len(differences) >= 4 else np.nan


def test_the_small_example() -> None:
    selector = selector_of(2)
    for epoch, loss in enumerate(EXAMPLE):
        selection = selector.begin_epoch(epoch)
        assert selection.num_kept == 2
        selector.observe([0, 1], {"loss": [loss, float(epoch % 2)]}, epoch)
        if epoch == 4:  # five losses have three differences, and the rule waits for a fourth
            assert np.isnan(selector.scores()["second_difference"]).all()
        if epoch == 5:
            assert selector.scores()["second_difference"][0] == pytest.approx(0.01677, abs=5e-6)
    assert selector.scores()["second_difference"][0] == pytest.approx(0.000133, abs=5e-7)
    selection = selector.begin_epoch(7)
    assert selection.ids.tolist() == [1]
    assert selection.forward_only_ids.tolist() == [0]
    assert (selection.requested, selection.expected_drops) == (0.5, 1)


def test_scores_are_those_of_a_loop_over_the_visits() -> None:
    rng = np.random.default_rng(0)
    losses_EN = np.where(rng.random((11, 20)) < 0.4, np.nan, rng.exponential(size=(11, 20)).astype(np.float32))
    selector = selector_of(20)
    for epoch, losses in enumerate(losses_EN):
        ids = np.flatnonzero(~np.isnan(losses))
        selector.observe(ids, {"loss": losses[ids]}, epoch)
    expected = [naive(losses[~np.isnan(losses)].tolist()) for losses in losses_EN.T]
    assert np.isnan(expected).any()
    np.testing.assert_allclose(selector.scores()["second_difference"], expected, rtol=1e-5)


def test_a_dropped_sample_is_scored_again_and_returns() -> None:
    selector = selector_of(3, threshold=0.01)
    for epoch in range(6):
        selector.observe([0, 1, 2], {"loss": [1.0, 1.0, float(epoch**2)]}, epoch)
    selection = selector.begin_epoch(6)
    assert selection.ids.tolist() == [2]
    selector.observe([2], {"loss": [36.0]}, 6)
    selector.observe([0, 1], {"loss": [1.0, 1.5]}, 6, sweep=True)
    assert selector.begin_epoch(7).ids.tolist() == [1, 2]


def test_where_none_is_mastered_any_more_all_are_used() -> None:
    selector = selector_of(2, threshold=0.01)
    for epoch in range(6):
        selector.observe([0, 1], {"loss": [1.0, float(epoch**2)]}, epoch)
    assert selector.begin_epoch(6).ids.tolist() == [1]
    selector.observe([0, 1], {"loss": [5.0, 36.0]}, 6)
    assert selector.begin_epoch(7).num_kept == 2  # the reference program would keep the last exclusion


def test_where_all_are_mastered_the_least_mastered_is_used() -> None:
    selector = selector_of(4)
    for epoch in range(6):
        selector.observe(range(4), {"loss": [1.0, 1.0 + 1e-4 * (epoch == 5), 1.0 + 1e-4 * (epoch == 5), 1.0]}, epoch)
    selection = selector.begin_epoch(6)
    assert selection.ids.tolist() == [1]
    assert selection.forward_only_ids.tolist() == [0, 2, 3]


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_mistakes(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold .* must be above 0: 1e-5 to 1e-1 is recommended"):
        build_method({"name": "ies", "threshold": threshold})


def test_a_threshold_that_drops_samples_conforms() -> None:
    check_method({"name": "ies", "threshold": 1.0})
