"""SeTa: windows, groups, the random share, partial annealing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import SeTa, build_method


def test_windows_slide_and_round_to_the_even_number() -> None:
    cifar, imagenet = SeTa(), SeTa(prune_ratio=0.0, window=0.6)
    assert [(w.start, w.stop) for w in map(cifar.groups_at, range(1, 5))] == [(1, 5), (0, 4), (1, 5), (0, 4)]
    assert [(w.start, w.stop) for w in map(imagenet.groups_at, range(1, 5))] == [(1, 4), (2, 5), (0, 3), (1, 4)]
    # round(4.5) is 4: with 5, no window would leave anything out.
    assert len(cifar.groups_at(1)) == 4
    assert list(SeTa(num_groups=3, window=0.1).groups_at(2)) == [2]
    assert list(SeTa(num_groups=4, window=1.0).groups_at(7)) == [0, 1, 2, 3]


def clustered(num_groups: int = 5, per_group: int = 40) -> np.ndarray:
    """Return losses in groups far apart, in mixed order; the group is the rounded loss."""
    rng = np.random.default_rng(0)
    return rng.permutation(np.repeat(np.arange(num_groups), per_group) + rng.uniform(-0.1, 0.1, num_groups * per_group))


def kept_groups(epoch: int, num_epochs: int = 16, **options: Any) -> np.ndarray:
    """Return how many of each group an epoch keeps."""
    losses = clustered()
    selector = Selector(build_method({"name": "seta", **options}), losses.size, num_epochs)
    selector.observe(np.arange(losses.size), {"loss": losses}, epoch - 1)
    return np.bincount(np.round(losses[selector.begin_epoch(epoch).ids]).astype(int), minlength=5)


def test_an_epoch_keeps_the_groups_of_its_window() -> None:
    assert kept_groups(1, prune_ratio=0.0).tolist() == [0, 40, 40, 40, 40]
    assert kept_groups(2, prune_ratio=0.0).tolist() == [40, 40, 40, 40, 0]
    assert kept_groups(2, prune_ratio=0.0, window=0.6).tolist() == [0, 0, 40, 40, 40]
    assert kept_groups(3, prune_ratio=0.0, window=0.6).tolist() == [40, 40, 40, 0, 0]


def test_the_window_applies_to_a_random_share() -> None:
    kept = kept_groups(1, prune_ratio=0.25)
    assert kept[0] == 0
    assert kept[1:].min() > 0
    assert kept.sum() < 160  # 150 drawn, of which about 30 are in group 0
    assert kept.sum() == pytest.approx(120, abs=25)


def test_partial_annealing_keeps_a_new_random_share_of_all() -> None:
    losses = clustered()
    selector = Selector(build_method({"name": "seta", "prune_ratio": 0.1}), 200, 16)
    selector.observe(np.arange(200), {"loss": losses}, 0)
    last = [selector.begin_epoch(epoch) for epoch in (13, 14, 15)]
    assert last[0].num_kept < 180  # 14 = 0.875·16 is the first epoch of annealing
    assert [(s.num_kept, s.requested, s.expected_drops) for s in last[1:]] == [(180, 0.1, 20)] * 2
    assert (last[1].codes != last[2].codes).any()
    assert kept_groups(14, prune_ratio=0.0).tolist() == [40] * 5


def test_facts_and_ratios_say_what_was_left_out() -> None:
    losses = clustered()
    selector = Selector(build_method({"name": "seta", "prune_ratio": 0.0}), 200, 16)
    selector.observe(np.arange(200), {"loss": losses}, 0)
    selection = selector.begin_epoch(1)
    assert (selection.requested, selection.expected_drops) == (0.2, 40)
    assert selection.facts["group_sizes"] == [40] * 5
    assert selection.facts["window"] == [1, 5]


@pytest.mark.parametrize("losses", [np.ones(50), np.repeat([1.0, 2.0], 25)])
def test_fewer_distinct_losses_than_groups_keep_all(losses: np.ndarray) -> None:
    selector = Selector(build_method({"name": "seta", "prune_ratio": 0.0}), 50, 16)
    selector.observe(np.arange(50), {"loss": losses}, 0)
    assert selector.begin_epoch(1).num_kept == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 0}, r"num_groups 0 is outside 1\.\.255"),
        ({"num_groups": 256}, r"num_groups 256 is outside 1\.\.255"),
        ({"window": 0.0}, r"window 0\.0 is outside \(0, 1\]: 1 keeps all groups"),
        ({"prune_ratio": 1}, r"outside \[0, 1\)"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method({"name": "seta", **options})
