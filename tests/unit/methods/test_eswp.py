"""ESWP: the weights against the small example and a loop, the draw in proportion to them, the full epochs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.testing import check_method


def selector_of(losses_EN: Any, num_epochs: int = 20, seed: int = 0, **options: Any) -> Selector:
    selector = Selector(build_method({"name": "eswp", **options}), len(losses_EN[0]), num_epochs, seed)
    for epoch, losses in enumerate(losses_EN):
        selector.observe(range(len(losses)), {"loss": losses}, epoch)
    return selector


def test_the_small_example() -> None:
    first = selector_of([[1, 2, 4, 0.5]])
    np.testing.assert_allclose(first.table["weight"], [0.85, 1.65, 3.25, 0.45], rtol=1e-6)
    np.testing.assert_allclose(first.table["average"], [0.325, 0.425, 0.625, 0.275], rtol=1e-6)
    second = selector_of([[1, 2, 4, 0.5], [0.5, 2, 1, 0.5]])
    np.testing.assert_allclose(second.table["weight"], [0.465, 1.685, 0.925, 0.455], rtol=1e-6)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.2, 0.9), (0.0, 0.0), (1.0, 0.5)])
def test_weights_are_those_of_a_loop(beta1: float, beta2: float) -> None:
    losses_EN = np.random.default_rng(0).exponential(size=(6, 15))
    selector = selector_of(losses_EN, beta1=beta1, beta2=beta2)
    for sample in range(15):
        average = 1 / 15
        for loss in losses_EN[:, sample]:
            weight, average = beta1 * average + (1 - beta1) * loss, beta2 * average + (1 - beta2) * loss
        assert selector.table["weight"][sample] == pytest.approx(weight, rel=1e-5)
        assert selector.table["average"][sample] == pytest.approx(average, rel=1e-5)


def test_the_draw_is_in_proportion_to_the_weights() -> None:
    num_seeds, times = 4000, np.zeros(4)
    for seed in range(num_seeds):
        kept = selector_of([[1, 2, 4, 0.5]], seed=seed, prune_ratio=0.75).begin_epoch(1).codes
        assert kept.sum() == 1
        times += kept
    expected = np.array([0.137097, 0.266129, 0.524194, 0.072581])
    assert (np.abs(times / num_seeds - expected) < 5 * np.sqrt(expected * (1 - expected) / num_seeds)).all()
    # In proportion to the losses it would be 0.1333, 0.2667, 0.5333, 0.0667; the highest alone, always id 2.
    assert times.min() > 0


def test_the_top_rule_takes_the_highest() -> None:
    for seed in range(5):
        selection = selector_of([[1, 2, 4, 0.5]], seed=seed, rule="top").begin_epoch(1)
        assert selection.ids.tolist() == [1, 2]


def test_both_ends_of_the_run_are_full() -> None:
    selector = selector_of([np.arange(1.0, 11.0)], num_epochs=40, warmup=0.1, anneal_start=0.8)
    kept = [selector.begin_epoch(epoch).num_kept for epoch in range(40)]
    assert kept == [10] * 4 + [5] * 28 + [10] * 8


def test_zero_losses_are_drawn_uniformly() -> None:
    kept = {tuple(selector_of([[0.0] * 4], seed=seed, beta1=0.0).begin_epoch(1).ids) for seed in range(100)}
    assert len(kept) == 6


def test_negative_losses_are_refused_before_anything_is_stored() -> None:
    selector = selector_of([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"one is -0\.5: use a loss that is never below 0"):
        selector.observe([0, 1], {"loss": [1.0, -0.5]}, 1)
    assert selector.table.last_visit.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.5}, r"beta1 1\.5 is outside \[0, 1\]"),
        ({"beta2": -0.1}, r"beta2 -0\.1 is outside \[0, 1\]"),
        ({"warmup": 2}, r"warmup 2 is outside \[0, 1\]"),
        ({"rule": "tops"}, "did you mean 'top'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method({"name": "eswp", **options})


def test_the_top_rule_conforms() -> None:
    check_method({"name": "eswp", "rule": "top"})
