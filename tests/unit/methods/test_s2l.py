"""S2L: clusters of loss trajectories, small examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selection, Selector
from rayprune.errors import ConfigError
from rayprune.methods import build_method
from rayprune.methods.s2l import draw_evenly

# Three courses of the loss in T = 3 epochs: falling (6 samples), always high (3), always low (1).
COURSES = {"falling": [3.0, 2.0, 1.0], "high": [4.0, 4.0, 4.0], "low": [0.1, 0.1, 0.1]}
KINDS = np.array(["falling", "high", "falling", "low", "falling", "high", "falling", "high", "falling", "falling"])


def selected(seed: int = 0, **options: Any) -> Selection:
    losses = np.array([COURSES[kind] for kind in KINDS]) + np.linspace(0, 0.01, 10)[:, None]
    selector = Selector(build_method({"name": "s2l", "score_epochs": 3, **options}), 10, 6, seed)
    for epoch in range(3):
        assert selector.begin_epoch(epoch).num_kept == 10
        selector.observe(np.arange(10), {"loss": losses[:, epoch]}, epoch)
    return selector.begin_epoch(3)


def counts(selection: Selection) -> dict[str, int]:
    return {kind: int((KINDS[selection.ids] == kind).sum()) for kind in COURSES}


@pytest.mark.parametrize(
    ("prune_ratio", "expected"),
    [
        (0.0, {"low": 1, "high": 3, "falling": 6}),
        # 7 samples: min(1, 7 // 3) = 1, min(3, 6 // 2) = 3, min(6, 3 // 1) = 3.
        (0.3, {"low": 1, "high": 3, "falling": 3}),
        # 4 samples: min(1, 4 // 3) = 1, min(3, 3 // 2) = 1, min(6, 2 // 1) = 2.
        (0.6, {"low": 1, "high": 1, "falling": 2}),
        # 1 sample: the largest cluster gets the remainder.
        (0.9, {"low": 0, "high": 0, "falling": 1}),
    ],
)
def test_every_course_of_the_loss_gives_as_many(prune_ratio: float, expected: dict[str, int]) -> None:
    for seed in range(5):
        assert counts(selected(seed, prune_ratio=prune_ratio, clusters=3)) == expected


def test_the_draw_within_a_cluster_depends_on_the_seed() -> None:
    drawn = {tuple(selected(seed, prune_ratio=0.6, clusters=3).ids) for seed in range(10)}
    assert len(drawn) > 3
    assert selected(4, clusters=3).ids.tolist() == selected(4, clusters=3).ids.tolist()


def test_more_clusters_than_samples() -> None:
    selection = selected(clusters=100)
    assert selection.num_kept == 5
    assert selection.facts["clusters"] == 10


def test_one_cluster_is_a_random_subset() -> None:
    assert {tuple(selected(seed, clusters=1).ids) for seed in range(5)} != {tuple(selected(0, clusters=1).ids)}


@pytest.mark.parametrize("count", range(1, 22))
def test_the_count_is_exact_and_no_cluster_gives_less_than_a_smaller_one(count: int) -> None:
    sizes = [1, 2, 2, 5, 11]
    clusters = np.split(np.arange(21), np.cumsum(sizes)[:-1])
    ids = draw_evenly(clusters, count, np.random.default_rng(0))
    assert np.unique(ids).size == ids.size == count
    given = [int(np.isin(cluster, ids).sum()) for cluster in clusters]
    assert given == sorted(given)


def test_the_mean_of_the_trajectory_is_for_people() -> None:
    selector = Selector(build_method({"name": "s2l", "score_epochs": 3}), 2, 5)
    assert np.isnan(selector.scores()["mean_loss"]).all()
    for epoch, losses in enumerate(([3.0, 1.0], [1.0, 1.0])):
        selector.begin_epoch(epoch)
        selector.observe(np.arange(2), {"loss": np.array(losses)}, epoch)
    assert selector.scores()["mean_loss"].tolist() == [2.0, 1.0]


def test_no_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match="clusters 0 must be at least 1"):
        build_method({"name": "s2l", "clusters": 0})
