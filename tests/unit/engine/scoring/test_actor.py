"""The ScoreActor as an object: exactly-once pushes, barriers, generations, and its state after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core import Plan, Selection
from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.loop_actor import LoopActor
from rayprune.engine.scoring.messages import AttemptKey, Barrier, StopReason
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.errors import CheckpointPending, ObservationsLost, StaleGeneration, UsageError
from rayprune.sources import open_data
from tests.support.runs import pass_of
from tests.unit.engine.scoring.scored_run import make_push, make_spec, save, train_pass

KEY = AttemptKey(generation=1, epoch=0)
ALONE = Barrier("close", 0, 1)


@pytest.fixture
def parts() -> list[NDArray[np.int64]]:
    """The ids of rank 0's three pushes."""
    return np.split(np.arange(12), 3)


@pytest.fixture
def actor(tmp_path: Path, parts: list[NDArray[np.int64]]) -> ScoreActor:
    """An actor in epoch 0 that has pushes 0 and 2 of rank 0's three."""
    return with_pushes(tmp_path, parts, (0, 2))


def with_pushes(folder: Path, parts: list[NDArray[np.int64]], sequences: tuple[int, ...]) -> ScoreActor:
    actor = ScoreActor(make_spec(folder))
    actor.announce(train_pass(0))
    for sequence in sequences:
        actor.observe(KEY, make_push(sequence, parts[sequence], 0))
    return actor


def final_losses(actor: ScoreActor) -> NDArray[Any]:
    """Close the epoch for one rank; return the table's losses."""
    assert actor.arrive(KEY, ALONE, 0, 0) == []
    snapshot = actor.pass_barrier(KEY, ALONE)
    assert snapshot is not None
    return snapshot.state["table/column/loss"]


def test_lost_pushes_are_named(actor: ScoreActor) -> None:
    assert actor.arrive(KEY, ALONE, 0, 3) == [1]
    assert actor.arrive(KEY, ALONE, 0, 5) == [1, 3, 4]
    assert actor.arrive(KEY, ALONE, 1, 2) == [0, 1]
    assert actor.arrive(KEY, ALONE, 1, 0) == []


def test_a_repeated_push_changes_nothing(actor: ScoreActor, parts: list[NDArray[np.int64]], tmp_path: Path) -> None:
    once = final_losses(actor).copy()
    assert actor.progress()[1] == 0, "the epoch was closed"
    repeated = with_pushes(tmp_path, parts, (0, 2, 0, 2, 2))
    assert repeated.progress()[1] == 8
    repeated.observe(KEY, make_push(0, parts[0], epoch=1))  # the same number with other losses
    assert np.array_equal(final_losses(repeated), once, equal_nan=True)


def test_an_epoch_closes_once_all_ranks_have_arrived(actor: ScoreActor, parts: list[NDArray[np.int64]]) -> None:
    both = Barrier("close", 7, 2)
    assert actor.arrive(KEY, both, 1, 0) == []
    assert actor.arrive(KEY, both, 0, 3) == [1]
    assert actor.pass_barrier(KEY, both) is None
    assert actor.absent_ranks(KEY, both) == [0]
    actor.observe(KEY, make_push(1, parts[1], 0))
    assert actor.arrive(KEY, both, 0, 3) == []
    assert actor.absent_ranks(KEY, both) == []
    snapshot = actor.pass_barrier(KEY, both)
    assert snapshot is not None
    with pytest.raises(StaleGeneration, match="a call of epoch 0 came in epoch 1"):
        actor.arrive(KEY, Barrier("close", 8, 2, 1), 0, 3)
    # The answers may have been lost: the same calls are answered again.
    assert actor.arrive(KEY, both, 1, 0) == []
    again = actor.pass_barrier(KEY, both)
    assert again is not None
    assert np.array_equal(again.state["selection/bitmap"], snapshot.state["selection/bitmap"])


def test_two_snapshots_at_one_step_are_two_barriers(actor: ScoreActor) -> None:
    for number in range(2):
        barrier = Barrier("snapshot", 3, 2, number)
        assert actor.arrive(KEY, barrier, 0, 0) == []
        assert actor.pass_barrier(KEY, barrier) is None, "rank 1 has not arrived"
        assert actor.arrive(KEY, barrier, 1, 0) == []
        assert actor.pass_barrier(KEY, barrier) is not None
    assert actor.arrive(KEY, Barrier("close", 5, 2, 2), 0, 0) == []


def test_ranks_at_different_barriers_are_refused(actor: ScoreActor) -> None:
    assert actor.arrive(KEY, Barrier("snapshot", 3, 2), 1, 0) == []
    with pytest.raises(UsageError, match="rank 0 is at step 5, the end of the epoch, another rank is at step 3: every"):
        actor.arrive(KEY, Barrier("close", 5, 2), 0, 0)


def test_calls_of_an_older_generation_are_refused(actor: ScoreActor, parts: list[NDArray[np.int64]]) -> None:
    actor.announce(train_pass(0, generation=2))
    with pytest.raises(StaleGeneration, match="generation 1 was replaced by 2"):
        actor.arrive(KEY, ALONE, 0, 1)
    with pytest.raises(StaleGeneration, match="generation 1"):
        actor.announce(train_pass(0))
    actor.observe(KEY, make_push(1, parts[1], 0))
    assert actor.progress()[1] == 0, "a push of the old generation was folded"


def test_a_restarted_actor_needs_the_checkpoint_of_its_epoch(tmp_path: Path) -> None:
    actor = ScoreActor(make_spec(tmp_path))
    actor.announce(train_pass(0))
    assert actor.arrive(KEY, ALONE, 0, 0) == []
    snapshot = actor.pass_barrier(KEY, ALONE)
    assert snapshot is not None
    expected = actor.announce(train_pass(1)).hash

    restarted, later = ScoreActor(make_spec(tmp_path)), AttemptKey(generation=1, epoch=1)
    with pytest.raises(CheckpointPending, match="before step 0 of epoch 1 is not written yet"):
        restarted.announce(train_pass(1))
    restarted.observe(later, make_push(0, np.arange(4), 1))  # dropped: the next barrier names it
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path, 1, snapshot.state)
    assert restarted.arrive(later, ALONE, 0, 1) == [0]
    assert restarted.announce(train_pass(1)).hash == expected


def test_a_restarted_actor_knows_which_epochs_start_without_a_checkpoint(tmp_path: Path) -> None:
    restarted = ScoreActor(replace(make_spec(tmp_path), checkpoint_epochs=2))
    with pytest.raises(ObservationsLost, match=r"before epoch 2 are in no checkpoint \(run.checkpoint_epochs = 2\)"):
        restarted.announce(train_pass(1))
    restarted.observe(AttemptKey(generation=1, epoch=1), make_push(0, np.arange(4), 1))
    with pytest.raises(CheckpointPending):
        restarted.announce(train_pass(2))


def test_a_restarted_actor_makes_the_same_plan(tmp_path: Path) -> None:
    first, restarted = ScoreActor(make_spec(tmp_path)), ScoreActor(make_spec(tmp_path))
    first.announce(train_pass(0))
    for ours, theirs in zip(
        restarted.rank_rows(train_pass(0), 1, 1, 4), first.rank_rows(train_pass(0), 1, 1, 4), strict=True
    ):
        assert np.array_equal(ours, theirs)


def test_blocks_hold_the_plan_from_the_first_pass_on() -> None:
    source = open_data("digits", limit=301).train
    actor = ScoreActor(ScoreSpec({"name": "full"}, source, 37, 3, 5, 8, "pad", 72, None, 0))
    assert actor.blocks() == ("train", [])
    actor.announce(pass_of(0, "train", 2, start_step=2))
    phase, blocks = actor.blocks()
    assert phase == "train"
    plan = Plan.of_selection(Selection.full(301), 8, 5, 0)
    for rank, (ids, weights) in enumerate(blocks):  # few enough rows for one block per rank
        expected_ids, expected_weights, _ = plan.rank_rows(rank, 2, 2, plan.num_steps)
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(weights, expected_weights)
    assert len(blocks) == 2


def test_filtered_streams_leave_out_other_rows_in_each_epoch() -> None:
    source = open_data("digits", limit=41).train
    actor = LoopActor(ScoreSpec({"name": "full"}, source, 0, 4, 5, 9, "pad", 64, None, 0))
    left_out = set()
    for epoch in range(4):
        actor.restore(1, epoch, None)
        actor.announce(pass_of(epoch, "train", 3))
        wanted = actor.wanted_rows(None)
        assert wanted is not None
        key, codes, _ = wanted
        left_out.add(tuple(np.flatnonzero(codes == 0)))
        assert actor.wanted_rows(key) is None
        again = actor.wanted_rows(None)
        assert again is not None
        assert np.array_equal(again[1], codes), "every task leaves out the same rows"
    assert all(len(rows) == 41 % 3 for rows in left_out)
    assert len(left_out) == 4


def test_the_first_reason_to_stop_is_kept(actor: ScoreActor) -> None:
    assert actor.stop_reason() is None
    actor.stop(StopReason("the first", failed=False))
    actor.stop(StopReason("the second", failed=True))
    assert actor.stop_reason() == StopReason("the first", failed=False)


def test_pulses_are_those_of_the_newest_attempt(actor: ScoreActor) -> None:
    actor.pulse(1, 0, 2, "in one step", 0.5)
    assert [(rank, pulse.doing) for rank, pulse in actor.pulses().items()] == [(0, "in one step"), (1, "nothing yet")]
    actor.pulse(2, 1, 2, "saving", 1.0)
    actor.pulse(1, 0, 2, "in one step", 9.0)
    assert [(rank, pulse.doing) for rank, pulse in actor.pulses().items()] == [(0, "nothing yet"), (1, "saving")]
