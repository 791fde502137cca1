"""PDD: the three variants, re-scoring, the full last epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.testing import check_method


def selector_of(values: Any, num_epochs: int = 30, seed: int = 0, **options: Any) -> Selector:
    selector = Selector(build_method({"name": "pdd", **options}), len(values), num_epochs, seed)
    selector.observe(range(len(values)), {selector.method.signals[0]: values}, 0)
    return selector


def test_dbpd_keeps_the_samples_below_the_threshold() -> None:
    selection = selector_of([0.1, 0.3, 0.29999, 0.9, 0.0]).begin_epoch(1)
    assert selection.ids.tolist() == [0, 2, 4]  # p_y = τ is dropped
    assert selection.forward_only_ids.tolist() == [1, 3]
    assert (selection.requested, selection.expected_drops) == (0.4, 2)
    assert selector_of([0.1, 0.3, 0.6], threshold=0.5).begin_epoch(1).ids.tolist() == [0, 1]


def test_a_threshold_of_zero_keeps_the_misclassified() -> None:
    selector = selector_of([1.0, 0.0, 1.0, 0.0], threshold=0.0)
    assert selector.method.signals == ("correct",)
    assert selector.begin_epoch(1).ids.tolist() == [1, 3]


def test_dropped_samples_return_when_they_are_scored_again() -> None:
    selector = selector_of([0.1, 0.9, 0.9])
    selection = selector.begin_epoch(1)
    selector.observe(selection.ids, {"prob_label": [0.8]}, 1)
    selector.observe(selection.forward_only_ids, {"prob_label": [0.2, 0.9]}, 1, sweep=True)
    assert selector.begin_epoch(2).ids.tolist() == [1]


def test_without_rescoring_they_wait_for_the_full_epoch() -> None:
    selector = selector_of([0.1, 0.9, 0.9, 0.2], num_epochs=5, rescore=False, anneal_start=0.8)
    kept = []
    for epoch in range(1, 5):
        selection = selector.begin_epoch(epoch)
        assert selection.num_scored == 0
        kept.append(selection.ids.tolist())
    assert kept == [[0, 3]] * 3 + [[0, 1, 2, 3]]


def test_where_all_are_learned_the_least_learned_is_used() -> None:
    selection = selector_of([0.9, 0.8, 0.8, 0.95]).begin_epoch(1)
    assert selection.ids.tolist() == [1]
    assert selection.expected_drops == 3


def test_smrd_keeps_as_many_random_samples() -> None:
    probs = np.where(np.arange(20) < 6, 0.1, 0.9)
    num_seeds, times = 2000, np.zeros(20)
    for seed in range(num_seeds):
        selection = selector_of(probs, seed=seed, variant="smrd").begin_epoch(1)
        assert selection.num_kept == 6
        assert sorted([*selection.ids, *selection.forward_only_ids]) == list(range(20))
        times += selection.codes
    assert np.abs(times / num_seeds - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / num_seeds)


def test_srd_keeps_a_falling_random_share() -> None:
    selector = selector_of(np.ones(1000), num_epochs=30, variant="srd", gamma=0.9)
    assert selector.method.signals == ("loss",)
    for epoch in range(1, 29):
        selection = selector.begin_epoch(epoch)
        assert selection.num_kept == 1000 - int((1 - 0.9**epoch) * 1000 + 1e-9)
        assert selection.num_scored == 0
    assert selector.begin_epoch(29).num_kept == 1000


def test_the_last_epoch_is_full_and_no_pass_comes_before_it() -> None:
    selector = selector_of(np.linspace(0, 1, 10))
    assert selector.begin_epoch(27).num_scored > 0
    assert selector.begin_epoch(28).num_scored == 0  # epoch 29 is full, whatever the scores
    assert selector.begin_epoch(29).num_kept == 10
    assert build_method("pdd").pruning_epochs(30) == range(1, 29)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold 1\.5 is outside \[0, 1\]"),
        ({"gamma": 0.0}, r"gamma 0\.0 is outside \(0, 1\]: 1 keeps all samples"),
        ({"variant": "dbdp"}, "did you mean 'dbpd'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method({"name": "pdd", **options})


@pytest.mark.parametrize("options", [{"variant": "srd"}, {"variant": "smrd"}, {"threshold": 0.0}, {"threshold": 1.0}])
def test_variants_conform(options: dict[str, Any]) -> None:
    check_method({"name": "pdd", **options})
