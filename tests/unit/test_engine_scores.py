"""The ScoreActor and its protocol without Ray: whatever is lost, repeated or late, scores and selections are exact.

Shapes: N samples, B rows of a push.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import losses_of, pass_of
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core import Plan, Selector
from rayprune.engine import recorder
from rayprune.engine.actor import ScoreActor, ScoreSpec
from rayprune.engine.checkpoint import write_checkpoint
from rayprune.engine.client import LocalChannel, ScoreClient
from rayprune.engine.protocol import AttemptKey, PlanPass, Push, StaleGeneration, StateOnItsWay, pack, unpack
from rayprune.engine.recorder import Recorder
from rayprune.engine.run_folder import read_selection
from rayprune.methods import InfoBatch
from rayprune.sources import open_data

NUM_SAMPLES, NUM_EPOCHS, BATCH, RANKS, PUSH_ROWS, SEED = 41, 4, 8, 2, 4, 3
# A moving average shows every observation that is folded twice or in another order.
METHOD = InfoBatch(prune_ratio=0.5, ema=0.5, anneal_start=1.0)
SOURCE = open_data("digits", limit=NUM_SAMPLES).train


def make_spec(folder: Path) -> ScoreSpec:
    return ScoreSpec(METHOD.to_config(), SOURCE, 0, NUM_EPOCHS, SEED, BATCH, "pad", 64, str(folder), NUM_EPOCHS)


def train_pass(epoch: int, generation: int = 1) -> PlanPass:
    return pass_of(epoch, "train", RANKS, generation=generation)


def push(sequence: int, ids: NDArray[np.int64], epoch: int) -> Push:
    return Push(0, sequence, *pack(ids, {"loss": losses_of(epoch, NUM_SAMPLES)[ids]}))


def save(folder: Path, epoch: int, state: dict[str, Any]) -> None:
    write_checkpoint(folder, epoch, model={}, trainer={}, selector=state, position={})


class FaultyChannel(LocalChannel):
    """A channel whose pushes meet a schedule of faults; when the schedule is used up, everything arrives.

    Faults: "lose" a push, deliver it "twice", "late" (after the next call that waits), "restart" the actor before it,
    or "forget" (the actor dies just after it has answered, and Ray asks the next one again). A checkpoint is being
    written (`writing`) until somebody needs it, or the next one comes.
    """

    def __init__(self, spec: ScoreSpec, faults: list[str]) -> None:
        super().__init__(ScoreActor(spec))
        self._spec, self._faults = spec, iter(faults)
        self._late: list[tuple[Any, ...]] = []
        self.writing: Callable[[], object] = lambda: None

    def _perform(self, method: str, *args: Any) -> Any:
        fault = next(self._faults, "none")
        if fault == "restart":
            self.actor = ScoreActor(self._spec)
        answer = getattr(self.actor, method)(*args)
        if fault == "twice" and method == "observe":
            self.actor.observe(*args)
        if fault == "forget":
            self.actor = ScoreActor(self._spec)
            answer = getattr(self.actor, method)(*args)
        return answer

    def call(self, method: str, *args: Any) -> Any:
        try:
            answer = self._perform(method, *args)
        except StateOnItsWay:
            self.writing()
            answer = self._perform(method, *args)
        late, self._late = self._late, []
        for overdue in reversed(late):
            self.actor.observe(*overdue)
        return answer

    def post(self, method: str, *args: Any) -> None:
        fault = next(self._faults, "none")
        if fault == "late":
            self._late.append(args)
        elif fault != "lose":
            self._perform(method, *args)


def record_epoch(
    client: ScoreClient, recorders: list[Recorder], generation: int, epoch: int, share: float = 1.0
) -> str:
    """Let every rank record this share of its rows, as workers do; return the plan's hash."""
    header = client.announce(train_pass(epoch, generation))
    steps = int(header.num_steps * share)
    for rank, rank_recorder in enumerate(recorders):
        rank_recorder.start_epoch(AttemptKey(generation, epoch))
        ids, _, real = client.rank_rows(train_pass(epoch, generation), rank, 0, steps)
        for rows in np.split(np.arange(ids.size), steps):
            losses = torch.from_numpy(losses_of(epoch, NUM_SAMPLES)[ids[rows]])
            rank_recorder.record(ids[rows], real[rows], {"loss": losses})
    return str(header.hash)


def make_recorders(client: ScoreClient) -> list[Recorder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "PUSH_ROWS", PUSH_ROWS)
        return [Recorder(client, rank, ("loss",)) for rank in range(RANKS)]


def train_epochs(
    client: ScoreClient, folder: Path, generation: int, first: int, stop: int
) -> tuple[list[str], dict[str, Any]]:
    """Train epochs [first, stop) as workers do; return the plans' hashes and the last state."""
    channel = client.channel
    assert isinstance(channel, FaultyChannel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "PUSH_ROWS", PUSH_ROWS)
        recorders = make_recorders(client)
        hashes = []
        for epoch in range(first, stop):
            hashes.append(record_epoch(client, recorders, generation, epoch))
            closed = None
            while closed is None:
                counts = [rank_recorder.flush() for rank_recorder in recorders]
                closed = client.close_epoch(AttemptKey(generation, epoch), counts)
            channel.writing()
            state = {name: array.copy() for name, array in closed.state.items()}
            channel.writing = partial(save, folder, epoch + 1, state)
        channel.writing()
    return hashes, closed.state


def oracle() -> tuple[list[str], Selector, list[NDArray[Any]]]:
    """Do the same in a Selector: each kept sample is observed once an epoch."""
    selector = Selector(METHOD, NUM_SAMPLES, NUM_EPOCHS, SEED)
    hashes, codes = [], []
    for epoch in range(NUM_EPOCHS):
        selection = selector.begin_epoch(epoch)
        hashes.append(Plan.of_selection(selection, BATCH, SEED, epoch).hash)
        codes.append(selection.codes)
        selector.observe(selection.ids, {"loss": losses_of(epoch, NUM_SAMPLES)[selection.ids]}, epoch)
    return hashes, selector, codes


def assert_equals_oracle(folder: Path, hashes: list[str], state: dict[str, Any]) -> None:
    expected_hashes, selector, codes = oracle()
    assert hashes == expected_hashes
    expected = selector.state_dict()
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(state[name], array, equal_nan=array.dtype.kind == "f"), name
    for epoch, expected_codes in enumerate(codes):
        stored = read_selection(folder, epoch)
        assert np.array_equal(stored.codes, expected_codes), epoch


@pytest.fixture
def half_recorded(tmp_path: Path) -> tuple[ScoreActor, list[NDArray[np.int64]]]:
    """An actor in epoch 0 with the pushes 0 and 2 of rank 0's three."""
    actor = ScoreActor(make_spec(tmp_path))
    actor.announce(train_pass(0))
    parts = np.split(np.arange(12), 3)
    for sequence in (0, 2):
        actor.observe(AttemptKey(1, 0), push(sequence, parts[sequence], 0))
    return actor, parts


def final_scores(actor: ScoreActor, counts: list[int]) -> NDArray[Any]:
    closed = actor.close_epoch(AttemptKey(1, 0), counts)
    assert closed is not None
    return closed.state["table/column/loss"]


arrays = st.tuples(
    st.integers(0, 9),
    st.lists(st.tuples(st.sampled_from(["f4", "f8", "i8", "u1", "?"]), st.integers(0, 3)), max_size=4),
)


@given(arrays, st.integers(0, 2**32 - 1))
def test_a_packed_push_comes_out_as_it_went_in(layout: tuple[int, list[tuple[str, int]]], seed: int) -> None:
    rows, columns = layout
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, rows)
    signals = {
        f"signal{number}": rng.integers(0, 200, (rows, width) if width else rows).astype(dtype)
        for number, (dtype, width) in enumerate(columns)
    }
    unpacked = unpack(*pack(ids, signals))
    assert list(unpacked) == ["id", *signals]
    assert unpacked["id"].dtype == np.int64
    for name, expected in {"id": ids, **signals}.items():
        assert unpacked[name].dtype == expected.dtype
        assert np.array_equal(unpacked[name], expected)


def test_missing_names_the_lost_pushes(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, _ = half_recorded
    assert actor.missing(AttemptKey(1, 0), 0, 3) == [1]
    assert actor.missing(AttemptKey(1, 0), 0, 5) == [1, 3, 4]
    assert actor.missing(AttemptKey(1, 0), 1, 2) == [0, 1]
    assert actor.missing(AttemptKey(1, 0), 1, 0) == []


def test_a_repeated_push_changes_nothing(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, parts = half_recorded
    once = final_scores(actor, [0, 0]).copy()
    assert actor.progress()[1] == 0, "the epoch was closed"
    again = ScoreActor(actor._spec)
    again.announce(train_pass(0))
    for sequence in (0, 2, 0, 2, 2):
        again.observe(AttemptKey(1, 0), push(sequence, parts[sequence], 0))
    assert again.progress()[1] == 8
    # The second push of the same number holds other losses: it must not be folded.
    again.observe(AttemptKey(1, 0), push(0, parts[0], 1))
    assert np.array_equal(final_scores(again, [0, 0]), once, equal_nan=True)


def test_an_epoch_does_not_close_before_all_is_in(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, parts = half_recorded
    assert actor.close_epoch(AttemptKey(1, 0), [3, 0]) is None
    assert actor.close_epoch(AttemptKey(1, 0), [3, 0]) is None
    actor.observe(AttemptKey(1, 0), push(1, parts[1], 0))
    closed = actor.close_epoch(AttemptKey(1, 0), [3, 0])
    assert closed is not None
    again = actor.close_epoch(AttemptKey(1, 0), [3, 0])
    assert again is not None, "an answer that got lost can be asked for again"
    assert np.array_equal(again.state["selection/bitmap"], closed.state["selection/bitmap"])
    with pytest.raises(StaleGeneration, match="epoch 0 in epoch 1"):
        actor.missing(AttemptKey(1, 0), 0, 3)


def test_an_older_generation_is_refused(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, parts = half_recorded
    actor.announce(train_pass(0, 2))
    with pytest.raises(StaleGeneration, match="generation 1 was replaced by 2"):
        actor.missing(AttemptKey(1, 0), 0, 1)
    with pytest.raises(StaleGeneration, match="generation 1"):
        actor.announce(train_pass(0))
    actor.observe(AttemptKey(1, 0), push(1, parts[1], 0))
    assert actor.progress()[1] == 0, "a push of the old generation was folded"


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_newer_generation_starts_from_the_checkpoint(tmp_path: Path, epoch: int) -> None:
    client = ScoreClient(FaultyChannel(make_spec(tmp_path), []))
    hashes, _ = train_epochs(client, tmp_path, 1, 0, epoch) if epoch else ([], {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "PUSH_ROWS", PUSH_ROWS)
        recorders = make_recorders(client)
        record_epoch(client, recorders, 1, epoch, share=0.5)  # what this attempt saw of the epoch is forgotten
    rest, state = train_epochs(client, tmp_path, 2, epoch, NUM_EPOCHS)
    assert_equals_oracle(tmp_path, hashes + rest, state)


def test_a_restarted_actor_waits_for_the_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    client = ScoreClient(FaultyChannel(make_spec(tmp_path), []))
    _, state = train_epochs(client, tmp_path, 1, 0, 1)
    (tmp_path / "checkpoints" / "epoch-000001" / "manifest.json").unlink()
    restarted = ScoreActor(make_spec(tmp_path))
    with pytest.raises(StateOnItsWay, match="before step 0 of epoch 1 is not written yet"):
        restarted.announce(train_pass(1))
    restarted.observe(
        AttemptKey(1, 1), push(0, np.arange(4), 1)
    )  # refused without a word: the flush will find it missing
    save(tmp_path, 1, state)
    assert restarted.missing(AttemptKey(1, 1), 0, 1) == [0]
    assert restarted.announce(train_pass(1)).hash == client.announce(train_pass(1)).hash


def test_selector_and_score_actor_agree(tmp_path: Path) -> None:
    hashes, state = train_epochs(ScoreClient(FaultyChannel(make_spec(tmp_path), [])), tmp_path, 1, 0, NUM_EPOCHS)
    assert_equals_oracle(tmp_path, hashes, state)
    assert len(set(hashes)) == NUM_EPOCHS
    assert read_selection(tmp_path, 1).realised > 0


FAULTS = st.lists(st.sampled_from(["none", "none", "lose", "twice", "late", "restart", "forget"]), max_size=80)


@given(FAULTS)
def test_no_schedule_of_faults_changes_scores_or_selections(faults: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hashes, state = train_epochs(ScoreClient(FaultyChannel(make_spec(folder), faults)), folder, 1, 0, NUM_EPOCHS)
        assert_equals_oracle(folder, hashes, state)


@pytest.mark.parametrize("fault", ["lose", "twice", "late", "restart", "forget"])
@pytest.mark.parametrize("period", [2, 3, 7])
def test_a_fault_at_every_kth_message(tmp_path: Path, fault: str, period: int) -> None:
    faults = [fault if number % period == 0 else "none" for number in range(100)]
    hashes, state = train_epochs(ScoreClient(FaultyChannel(make_spec(tmp_path), faults)), tmp_path, 1, 0, NUM_EPOCHS)
    assert_equals_oracle(tmp_path, hashes, state)
