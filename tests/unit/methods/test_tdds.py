"""TDDS: invalid hyperparameters and observations, and the subset."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rayprune
from rayprune.core import Schedule, Selector
from rayprune.methods import build_method

UNIFORM = np.full((6, 4), 0.25, dtype=np.float32)


def tdds(**options: Any) -> Any:
    return build_method({"name": "tdds", **options})


def short(**options: Any) -> Selector:
    """Return a Selector over 6 samples that scores 3 epochs."""
    return Selector(tdds(trajectory_len=3, window_size=3, **options), 6, 8)


def after_one_epoch(**options: Any) -> Selector:
    selector = short(**options)
    selector.observe(np.arange(6), {"probs": UNIFORM}, 0)
    return selector


def probs(*row: float, dtype: Any = np.float32) -> NDArray[Any]:
    """Return probabilities of two samples; the first are uniform."""
    return np.array([[0.25, 0.25, 0.25, 0.25], row], dtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 2}, "window_size 2 makes every score 0: it must be at least 3"),
        ({"window_size": 1}, "window_size 1 makes every score 0"),
        ({"trajectory_len": 5, "window_size": 6}, "window_size 6 is longer than trajectory_len 5: lower it, or raise"),
        ({"also": [[5, 6]]}, "window_size 6 is longer than trajectory_len 5"),
        ({"also": [[5, 2]]}, "window_size 2 makes every score 0"),
        ({"also": [[10, 10]]}, "also names [10, 10], which is scored already: leave it out"),
        ({"also": [[9, 3], [8, 3], [9, 3]]}, "also names [9, 3], which is scored already"),
        ({"also": [[9]]}, "also = [[9]]: must be a list of lists of 2 whole numbers"),
        ({"also": [9, 3]}, "also = [9, 3]: must be a list of lists of 2 whole numbers"),
        ({"also": [[9, 3.5]]}, "must be a list of lists of 2 whole numbers"),
        ({"decay": 0.0}, "decay 0.0 is outside (0, 1]"),
        ({"decay": 1.5}, "decay 1.5 is outside (0, 1]"),
        ({"prune_ratio": 1.0}, "prune_ratio 1.0 is outside [0, 1)"),
        ({"prune_ratio": -0.1}, "prune_ratio -0.1 is outside [0, 1)"),
        ({"prune_ratio": {"schedule": "linear"}}, "one subset takes no schedule: give a number in [0, 1)"),
        ({"prune_ratio": Schedule.of(0.5)}, "one subset takes no schedule"),
        ({"prune_ratio": "half"}, "prune_ratio = 'half': one subset takes no schedule: give a number"),
        ({"storage": "float64"}, "storage = 'float64'"),
        ({"trajectory_len": 10.5}, "trajectory_len = 10.5: must be a whole number"),
    ],
)
def test_invalid_hyperparameters_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        tdds(**options)
    assert "\n" not in str(caught.value)


def test_pairs_are_lists_in_the_config() -> None:
    method = tdds(also=[[90, 10], [30, 10]])
    assert method.also == ((90, 10), (30, 10))
    assert method.to_config()["also"] == [[90, 10], [30, 10]]
    assert method.collect_epochs == 90
    assert build_method(method.to_config()) == method == rayprune.TDDS(also=((90, 10), (30, 10)))
    assert build_method({"name": "shuffled", "of": method.to_config()}).collect_epochs == 90


def test_a_run_shorter_than_the_trajectory_is_refused() -> None:
    for method in (tdds(trajectory_len=90), tdds(also=[[90, 10]])):
        with pytest.raises(ValueError, match="trajectory_len 90 needs at least 90 epochs, the run has 20: lower it"):
            Selector(method, 6, 20).begin_epoch(0)
    assert Selector(tdds(trajectory_len=20), 6, 20).begin_epoch(0).num_kept == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (probs(1.0, 0.0, 0.0, 0.0, dtype=np.float16), "probs are float16, in which small probabilities become 0"),
        (probs(2.5, -1.0, 0.3, 0.1), "probs of id 5 lie in -1 … 2.5 and sum to 1.9: they must be at least 0"),
        (probs(2.5, 1.0, 0.3, 0.1), "probs of id 5 lie in 0.1 … 2.5 and sum to 3.9"),
        (probs(1.2, -0.2, 0.0, 0.0), "of logits take softmax"),
        (probs(0.5, 0.3, 0.1, 0.098), "sum to 0.998"),
        (np.full((2, 5), 0.2), "probs are of 5 classes, and were of 4 before"),
        (np.full(2, 0.5), "probs of shape (2,) must be (samples, classes)"),
        (np.ones((2, 1)), "probs of shape (2, 1) must be (samples, classes), with at least two classes"),
        (np.full((2, 2, 2), 0.5), "probs of shape (2, 2, 2) must be"),
    ],
)
def test_invalid_probabilities_are_refused(values: NDArray[Any], message: str) -> None:
    selector = after_one_epoch()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        selector.observe([3, 5], {"probs": values}, 1)
    assert "\n" not in str(caught.value)
    assert selector.table.last_visit.tolist() == [0] * 6
    selector.observe([3, 5], {"probs": probs(0.7, 0.1, 0.1, 0.1)}, 1)
    assert selector.table.last_visit.tolist() == [0, 0, 0, 1, 0, 1]


def test_a_refused_first_observation_does_not_set_the_number_of_classes() -> None:
    selector = short()
    with pytest.raises(ValueError, match="sum to"):
        selector.observe([0, 1], {"probs": np.ones((2, 7))}, 0)
    selector.observe(np.arange(6), {"probs": UNIFORM}, 0)
    assert selector.table["previous"].shape == (6, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integers_and_rounded_sums_are_accepted(dtype: Any) -> None:
    selector = after_one_epoch()
    selector.observe([0], {"probs": np.array([[0, 0, 1, 0]])}, 1)
    selector.observe([1], {"probs": np.array([[0.25, 0.25, 0.25, 0.2495]], dtype=dtype)}, 1)
    assert selector.table.last_visit.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_a_repeat_counts_once_and_a_different_one_is_refused(storage: str) -> None:
    selector = after_one_epoch(storage=storage)
    values = probs(0.7, 0.1, 0.1, 0.1)
    selector.observe([3, 5], {"probs": values}, 1)
    changes = selector.table["changes"].copy()
    selector.observe([5, 3], {"probs": values[::-1]}, 1)
    selector.observe([3, 5, 2], {"probs": np.vstack([values, UNIFORM[:1]])}, 1)
    assert changes[3, 0] == 0.0
    assert changes[5, 0] > 0.1
    assert np.array_equal(selector.table["changes"][[3, 5]], changes[[3, 5]], equal_nan=True)
    before = selector.table["previous"].tobytes()
    with pytest.raises(ValueError, match="id 5 was observed twice in epoch 1 with different probabilities: a sampler"):
        selector.observe([3, 5, 1], {"probs": np.vstack([probs(0.6, 0.2, 0.1, 0.1), UNIFORM[:1]])}, 1)
    assert selector.table["previous"].tobytes() == before
    assert selector.table.last_visit[1] == 0


def test_epochs_out_of_order_are_refused() -> None:
    with pytest.raises(
        ValueError, match="id 2 was never visited before and now comes in epoch 1: every sample must be"
    ):
        short().observe([2], {"probs": UNIFORM[:1]}, 1)
    selector = after_one_epoch()
    with pytest.raises(ValueError, match=r"id 2 was last visited in epoch 0 and now comes in epoch 2.*last_batch=drop"):
        selector.observe([2], {"probs": UNIFORM[:1]}, 2)
    selector.observe([2], {"probs": UNIFORM[:1]}, 1)
    with pytest.raises(ValueError, match="id 2 comes in epoch 0 and came in epoch 1 before"):
        selector.observe([2], {"probs": UNIFORM[:1]}, 0)


def test_missing_visits_are_named() -> None:
    selector = after_one_epoch()
    assert selector.begin_epoch(1).num_kept == 6
    selector.observe([0, 2, 4, 5], {"probs": UNIFORM[:4]}, 1)
    with pytest.raises(
        ValueError, match=r"2 of 6 samples were not visited in epoch 1, ids \[1, 3\]: every sample must"
    ):
        selector.begin_epoch(2)
    selector.observe([1, 3], {"probs": UNIFORM[:2]}, 1)
    assert selector.begin_epoch(2).num_kept == 6


def test_the_subset_stays_and_has_facts() -> None:
    selector = after_one_epoch(prune_ratio=0.4)
    rows = np.array([[0.25 + 0.1 * i, 0.25, 0.25, 0.25 - 0.1 * i] for i in (0, 1, 2, 0.5, 1.5, 2.4)])
    selector.observe(np.arange(6), {"probs": rows}, 1)
    selector.observe(np.arange(6), {"probs": rows}, 2)
    for epoch in (3, 5, 7):
        selection = selector.begin_epoch(epoch)
        assert selection.ids.tolist() == [1, 2, 4, 5]
        assert selection.weights.tolist() == [1.0] * 4
        assert (selection.requested, selection.expected_drops) == (0.4, 2)
        facts = {name: selection.facts[name] for name in ("score", "trajectory_len", "window_size")}
        assert facts == {"score": "tdds", "trajectory_len": 3, "window_size": 3}
        assert selection.facts["threshold"] == selector.scores()["tdds"][1] > 0


def test_one_sample_is_kept_at_the_highest_ratio() -> None:
    selector = after_one_epoch(prune_ratio=1 - 1e-12)
    for epoch in (1, 2):
        selector.observe(np.arange(6), {"probs": UNIFORM}, epoch)
    assert selector.begin_epoch(3).ids.tolist() == [0]


def test_a_class_floor_tops_up_with_the_same_samples_in_every_epoch() -> None:
    labels = np.arange(40) // 20
    selector = Selector(tdds(trajectory_len=3, window_size=3, class_floor=0.4), 40, 8, seed=1, labels=labels)
    rng = np.random.default_rng(0)
    for epoch in range(3):
        probs_NC = rng.dirichlet(np.ones(4), size=40)
        probs_NC[:20] = 0.25  # class 0 never changes and would be dropped entirely
        selector.observe(np.arange(40), {"probs": probs_NC}, epoch)
    first = selector.begin_epoch(3)
    assert np.bincount(labels[first.ids]).tolist() == [8, 20]
    assert selector.begin_epoch(4).ids.tolist() == selector.begin_epoch(7).ids.tolist() == first.ids.tolist()


def test_shuffled_scores_keep_as_many_others() -> None:
    ours, control = (
        Selector(build_method(config), 200, 8, seed=2)
        for config in (
            {"name": "tdds", "trajectory_len": 3, "window_size": 3, "prune_ratio": 0.7},
            {"name": "shuffled", "of": {"name": "tdds", "trajectory_len": 3, "window_size": 3, "prune_ratio": 0.7}},
        )
    )
    rng = np.random.default_rng(0)
    for epoch in range(3):
        probs_NC = rng.dirichlet(np.ones(4), size=200)
        for selector in (ours, control):
            selector.observe(np.arange(200), {"probs": probs_NC}, epoch)
    chosen, permuted = ours.begin_epoch(3), control.begin_epoch(3)
    assert chosen.num_kept == permuted.num_kept == 60
    assert chosen.facts["threshold"] == permuted.facts["threshold"]
    assert np.intersect1d(chosen.ids, permuted.ids).size < 40
    assert control.begin_epoch(5).ids.tolist() == permuted.ids.tolist()
