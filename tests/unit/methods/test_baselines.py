"""Properties of the baselines and the control arm beyond the conformance suite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core import Selection, Selector
from rayprune.methods import build_method

NUM_EPOCHS = 12


def selections(config: dict[str, Any], num_samples: int, seed: int = 0) -> list[Selection]:
    """Run a method on samples with losses 0, 1, 2, …, the same in every epoch."""
    selector = Selector(build_method(config), num_samples, NUM_EPOCHS, seed)
    results = []
    for epoch in range(NUM_EPOCHS):
        results.append(selector.begin_epoch(epoch))
        selector.observe(results[-1].ids, {"loss": results[-1].ids.astype(float)}, epoch)
    assert selector.scores()["loss"][results[0].ids].tolist() == results[0].ids.tolist()
    return results


def kept_EN(config: dict[str, Any], num_samples: int, seed: int = 0) -> NDArray[np.bool_]:
    return np.array([selection.codes != 0 for selection in selections(config, num_samples, seed)])


def test_full_keeps_all_samples() -> None:
    assert kept_EN({"name": "full"}, 9).all()


def test_a_static_subset_is_one_uniform_subset() -> None:
    counts = np.zeros(10)
    for seed in range(800):
        kept = kept_EN({"name": "random", "prune_ratio": 0.7}, 10, seed)
        assert (kept == kept[0]).all()
        assert kept[0].sum() == 3
        counts += kept[0]
    assert np.abs(counts / 800 - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 800)


def test_static_subsets_of_a_schedule_are_nested() -> None:
    kept = kept_EN({"name": "random", "prune_ratio": {"schedule": "linear", "start": 0.1, "end": 0.9}}, 50)
    assert (kept[1:] <= kept[:-1]).all()
    assert kept.sum(axis=1)[[0, -1]].tolist() == [45, 5]


@pytest.mark.parametrize(("num_samples", "prune_ratio"), [(20, 0.75), (10, 0.7), (11, 0.3), (7, 0.5), (3, 0.9)])
def test_without_replacement_no_sample_repeats_before_all_have_come(num_samples: int, prune_ratio: float) -> None:
    config = {"name": "random_epoch", "prune_ratio": prune_ratio, "replacement": False}
    for seed in range(5):
        times_EN = np.cumsum(kept_EN(config, num_samples, seed), axis=0)
        assert (times_EN.max(axis=1) - times_EN.min(axis=1) <= 1).all()
        assert times_EN[0].sum() == num_samples - int(prune_ratio * num_samples + 1e-9)


def test_with_replacement_epochs_are_independent_uniform_draws() -> None:
    runs_REN = np.array([kept_EN({"name": "random_epoch", "prune_ratio": 0.6}, 10, seed) for seed in range(200)])
    assert (runs_REN.sum(axis=2) == 4).all()
    assert np.abs(runs_REN.mean(axis=0) - 0.4).max() < 5 * np.sqrt(0.4 * 0.6 / 200)
    again = (runs_REN[:, 1:] & runs_REN[:, :-1]).mean()
    assert abs(again - 0.16) < 0.02


def test_the_control_prunes_as_much_but_not_by_score() -> None:
    inner = {"name": "infobatch", "prune_ratio": 0.5, "anneal_start": 1.0}
    own = kept_EN(inner, 40)
    runs_REN = np.array([kept_EN({"name": "shuffled", "of": inner}, 40, seed) for seed in range(100)])
    assert own[1:, 20:].all()
    assert own.sum(axis=1).tolist() == runs_REN[0].sum(axis=1).tolist()
    # Low and high losses are dropped equally often.
    assert np.abs(runs_REN[:, 1:].mean(axis=(0, 1)) - 0.75).max() < 0.1


def test_the_control_of_a_fixed_subset_is_a_fixed_subset() -> None:
    kept = kept_EN({"name": "shuffled", "of": {"name": "random", "prune_ratio": 0.5}}, 30)
    assert (kept == kept[0]).all()
    assert kept[0].sum() == 15
