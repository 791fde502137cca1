"""RCAP: class numbers and draws against the small example, the closed form, and the known overshoot."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.methods.rcap import class_losses
from rayprune.testing import check_method


def selector_of(losses: Any, labels: Any, seed: int = 0, **options: Any) -> Selector:
    selector = Selector(build_method({"name": "rcap", **options}), len(losses), 10, seed, labels)
    selector.observe(range(len(losses)), {"loss": losses}, 0)
    return selector


def test_class_numbers_of_the_small_example() -> None:
    labels = np.repeat([0, 1], [800, 200])
    losses = np.where(labels == 0, 0.1, 0.9)
    for prune_ratio, expected in ((0.9, [40, 60]), (0.7, [120, 180])):
        kept = selector_of(losses, labels, prune_ratio=prune_ratio).begin_epoch(1).ids
        assert np.bincount(labels[kept]).tolist() == expected
    # 40 % kept: class 1 would get 240 and has 200; class 0 gets what is left. Dividing the whole budget again, as the
    # released program does, would keep more than 400.
    kept = selector_of(losses, labels, prune_ratio=0.6).begin_epoch(1).ids
    assert np.bincount(labels[kept]).tolist() == [200, 200]


def test_draws_inside_a_class_are_those_of_the_small_example() -> None:
    num_seeds, times = 4000, np.zeros(3)
    labels = [0, 0, 0, 1, 1, 1]
    losses = [0.2, 1.0, 3.0, 1.4, 1.4, 1.4]
    for seed in range(num_seeds):
        kept = selector_of(losses, labels, seed, prune_ratio=4 / 6).begin_epoch(1).codes
        assert kept.sum() == 2
        assert kept[3:].sum() == 1
        times += kept[:3]
    expected = np.exp(np.minimum([0.2, 1.0, 3.0], log(2)))
    expected /= expected.sum()
    np.testing.assert_allclose(expected, [0.233922, 0.383039, 0.383039], atol=1e-6)
    assert (np.abs(times / num_seeds - expected) < 5 * np.sqrt(expected * (1 - expected) / num_seeds)).all()


def test_beta_is_the_temperature() -> None:
    num_seeds, labels, losses = 3000, [0, 0, 1, 1], [0.0, 0.6, 0.3, 0.3]
    for beta in (1 / 3, 3.0):
        times = np.zeros(4)
        for seed in range(num_seeds):
            times += selector_of(losses, labels, seed, prune_ratio=0.5, beta=beta).begin_epoch(1).codes
        expected = 1 / (1 + np.exp(-0.6 / beta))
        assert abs(times[1] / num_seeds - expected) < 5 * np.sqrt(expected * (1 - expected) / num_seeds)


def test_class_means_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 2, 3], 100)  # class 1 is absent
    losses = np.where(rng.random(100) < 0.2, np.nan, rng.exponential(size=100)).astype(np.float32)
    losses[labels == 3] = np.nan
    sizes, means = class_losses(losses, labels)
    assert sizes.tolist() == [(labels == c).sum() for c in range(4)]
    known = losses[~np.isnan(losses)].astype(float)
    for label in (0, 2):
        of = losses[(labels == label) & ~np.isnan(losses)].astype(float)
        assert means[label] == pytest.approx(of.mean())
    assert means[3] == pytest.approx(known.mean())


def test_classes_with_losses_of_zero_share_the_rest_by_size() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 40])
    losses = np.where(labels == 0, 1.0, 0.0)
    kept = selector_of(losses, labels, prune_ratio=40 / 70).begin_epoch(1).ids
    assert np.bincount(labels[kept]).tolist() == [10, 7, 13]
    all_zero = selector_of(np.zeros(70), labels, prune_ratio=0.5).begin_epoch(1).ids
    assert np.bincount(labels[all_zero]).tolist() == [5, 10, 20]


def test_one_class_and_an_absent_one() -> None:
    assert selector_of([1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0]).begin_epoch(1).num_kept == 2
    assert selector_of([1.0, 2.0, 3.0, 4.0], [0, 0, 5, 5]).begin_epoch(1).num_kept == 2


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"beta 0\.0 must be above 0: 1/3 to 3 is recommended"):
        build_method({"name": "rcap", "beta": 0.0})
    with pytest.raises(ValueError, match="rcap balances classes and needs labels"):
        Selector(build_method("rcap"), 4, 10)


def test_another_temperature_conforms() -> None:
    check_method({"name": "rcap", "beta": 0.01})
