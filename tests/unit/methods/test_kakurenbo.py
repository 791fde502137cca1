"""KAKURENBO: which samples are hidden, the schedule, the learning rate and the forward-only pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selection, Selector
from rayprune.methods import build_method


def selection_of(
    loss: Any, correct: Any, confidence: Any, num_epochs: int = 10, epoch: int = 1, **options: Any
) -> Selection:
    selector = Selector(build_method({"name": "kakurenbo", **options}), len(loss), num_epochs)
    signals = {"loss": np.array(loss), "correct": np.array(correct), "confidence": np.array(confidence)}
    selector.observe(np.arange(len(loss)), signals, epoch - 1)
    return selector.begin_epoch(epoch)


def test_the_small_example() -> None:
    losses = [0.01, 0.02, 0.03, *np.linspace(0.2, 2.0, 7)]
    correct, confidence = [1, 1, 0] + [1] * 7, [0.99, 0.6, 0.9] + [0.99] * 7
    selection = selection_of(losses, correct, confidence)
    assert np.flatnonzero(selection.codes == 0).tolist() == [0]
    assert selection.forward_only_ids.tolist() == [0]
    assert selection.requested == 0.3
    assert selection.expected_drops == 1
    assert selection.lr_scale == pytest.approx(1 / 0.7)  # the scheduled share; 1/0.9 is that of the hidden ones
    assert selection.facts["candidates"] == 3


def test_the_rule_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    for num in (1, 2, 9, 50):
        loss = np.round(rng.exponential(size=num), 1).astype(np.float32)  # with ties
        correct, confidence = rng.random(num) < 0.7, rng.random(num)
        for ratio in (0.0, 0.29, 0.95):
            selection = selection_of(loss, correct, confidence, prune_ratio=ratio, milestones=[], factors=[])
            candidates = sorted(range(num), key=lambda i: (loss[i], -i))[: int(ratio * num + 1e-9)]
            hidden = sorted(i for i in candidates if correct[i] and confidence[i] >= 0.7)
            assert np.flatnonzero(selection.codes == 0).tolist() == hidden
            assert selection.forward_only_ids.tolist() == hidden


def test_the_share_falls_at_the_milestones() -> None:
    losses, ones = np.linspace(0, 1, 1000), np.ones(1000)
    for epoch, share in ((1, 0.3), (29, 0.3), (30, 0.24), (59, 0.24), (60, 0.18), (79, 0.18), (80, 0.12), (89, 0.12)):
        selection = selection_of(losses, ones, ones, 90, epoch)
        assert selection.realised == pytest.approx(share)
        assert selection.lr_scale == pytest.approx(1 / (1 - share))
    cifar = {"milestones": [0.3, 0.6, 0.8]}
    for epoch, share in ((59, 0.3), (60, 0.24), (120, 0.18), (160, 0.12)):
        assert selection_of(losses, ones, ones, 200, epoch, **cifar).realised == pytest.approx(share)


def test_a_schedule_is_multiplied_by_the_factors() -> None:
    ramp = {"schedule": "linear", "start": 0.0, "end": 0.4}
    losses, ones = np.linspace(0, 1, 1000), np.ones(1000)
    options = {"prune_ratio": ramp, "milestones": [0.5], "factors": [0.25]}
    assert selection_of(losses, ones, ones, 5, 1, **options).requested == pytest.approx(0.1)
    assert selection_of(losses, ones, ones, 5, 3, **options).requested == pytest.approx(0.3 * 0.25)


def test_hidden_samples_come_back_after_a_forward_pass() -> None:
    selector = Selector(build_method({"name": "kakurenbo"}), 10, 10)
    signals = {"loss": np.arange(10.0), "correct": np.ones(10), "confidence": np.ones(10)}
    selector.observe(np.arange(10), signals, 0)
    first = selector.begin_epoch(1)
    assert first.forward_only_ids.tolist() == [0, 1, 2]
    # Forgotten, uncertain, and still fine.
    again = {"loss": np.zeros(3), "correct": np.array([0.0, 1.0, 1.0]), "confidence": np.array([0.9, 0.5, 0.9])}
    selector.observe(first.forward_only_ids, again, 1, sweep=True)
    assert np.flatnonzero(selector.begin_epoch(2).codes == 0).tolist() == [2]


def test_no_forward_pass_after_the_last_epoch_that_may_hide() -> None:
    losses, ones = np.linspace(0, 1, 10), np.ones(10)
    assert selection_of(losses, ones, ones, 10, 9).num_scored == 0
    assert selection_of(losses, ones, ones, 10, 9).realised > 0
    assert selection_of(losses, ones, ones, 10, 8).num_scored > 0


def test_a_class_floor_takes_hidden_samples_back_and_out_of_the_pass() -> None:
    method = build_method(
        {"name": "kakurenbo", "prune_ratio": 0.9, "milestones": [], "factors": [], "class_floor": 0.5}
    )
    selector = Selector(method, 10, 10, labels=np.arange(10) % 2)
    selector.observe(np.arange(10), {"loss": np.arange(10.0), "correct": np.ones(10), "confidence": np.ones(10)}, 0)
    selection = selector.begin_epoch(1)
    assert selection.num_kept == 6
    assert sorted([*selection.ids, *selection.forward_only_ids]) == list(range(10))


def test_samples_without_a_loss_are_no_candidates() -> None:
    selector = Selector(build_method({"name": "kakurenbo", "prune_ratio": 0.9, "milestones": [], "factors": []}), 10, 9)
    selector.observe([2, 5, 7], {"loss": [1.0, 2.0, 3.0], "correct": np.ones(3), "confidence": np.ones(3)}, 0)
    selection = selector.begin_epoch(1)
    assert selection.forward_only_ids.tolist() == [2, 5, 7]
    assert selection.facts["candidates"] == 3


def test_partly_correct_predictions_of_dense_tasks_are_not_correct() -> None:
    assert selection_of([0.0, 1.0], [0.99, 1.0], [1.0, 1.0], prune_ratio=0.5).realised == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestones": [0.5]}, r"milestones \(0\.5,\) must ascend, with one factor each"),
        ({"milestones": [0.5, 0.4], "factors": [1, 1]}, "must ascend"),
        ({"milestones": [1.5], "factors": [1]}, r"milestone 1\.5 is outside \[0, 1\]"),
        ({"milestones": [0.5], "factors": [1.2]}, r"factor 1\.2 is outside \[0, 1\]"),
        ({"min_confidence": -0.1}, r"min_confidence -0\.1 is outside \[0, 1\]"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method({"name": "kakurenbo", **options})
