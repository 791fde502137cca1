"""The ScoreActor and its protocol without Ray: whatever is lost, repeated or late, scores and selections are exact.

Shapes: N samples, B rows of a push.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core import Plan, Selector
from rayprune.engine.scoring import recorder
from rayprune.engine.scoring import session as session_module
from rayprune.engine.scoring.actor import ScoreActor, ScoreSpec
from rayprune.engine.scoring.client import LocalChannel, ScoreClient
from rayprune.engine.scoring.messages import (
    AttemptKey,
    Barrier,
    EpochSnapshot,
    Moment,
    PlanHeader,
    PlanPass,
    Push,
    RankRows,
    pack,
    unpack,
)
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.engine.storage.run_folder import read_selection
from rayprune.errors import CheckpointPending, StaleGeneration
from rayprune.methods import InfoBatch
from rayprune.sources import open_data
from tests.support.runs import losses_of, pass_of

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
        self._one_at_a_time = threading.RLock()
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
        with self._one_at_a_time:
            try:
                answer = self._perform(method, *args)
            except CheckpointPending:
                self.writing()
                answer = self._perform(method, *args)
            late, self._late = self._late, []
            for overdue in reversed(late):
                self.actor.observe(*overdue)
            return answer

    def post(self, method: str, *args: Any) -> None:
        with self._one_at_a_time:
            fault = next(self._faults, "none")
            if fault == "late":
                self._late.append(args)
            elif fault != "lose":
                self._perform(method, *args)


class Ranks:
    """The sessions of an attempt, each in a thread where they meet; a broadcast reaches all, as Ray Train's does."""

    def __init__(self, client: ScoreClient, generation: int) -> None:
        self.sessions = [ScoringSession(client, generation, rank, RANKS, ("loss",)) for rank in range(RANKS)]
        self._own, self._met = threading.local(), threading.Barrier(RANKS, timeout=20)
        self._slot: Any = None

    def record_epoch(self, epoch: int, share: float = 1.0) -> PlanHeader:
        """Let every rank record this share of its rows, as workers do; return the plan's header."""
        for session in self.sessions:
            session.start_epoch(epoch)
            header = session.announce()
            steps = int(header.num_steps * share)
            for ids, real in itertools.islice(session.batches(header, cut), steps):
                losses = torch.from_numpy(losses_of(epoch, NUM_SAMPLES)[ids])
                session.recorder.record(ids, real, {"loss": losses})
        return header

    def meet(self, moment: Moment, step: int) -> EpochSnapshot:
        """Let all ranks come to a barrier; return what rank 0 gets."""
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(RANKS) as pool:
            patch.setattr(session_module, "broadcast_from_rank_zero", self._broadcast)
            patch.setattr(session_module, "_MEET_S", 0.02)
            results = [pool.submit(self._come, session, moment, step) for session in self.sessions]
            snapshot, *_ = [result.result() for result in results]
        return snapshot

    def _come(self, session: ScoringSession[ScoreClient], moment: Moment, step: int) -> EpochSnapshot:
        self._own.rank = session.rank
        return session.barrier(moment, step)

    def _broadcast(self, value: Any) -> Any:
        if self._own.rank == 0:
            self._slot = value
        self._met.wait()
        answer = self._slot
        self._met.wait()
        return answer


def cut(_: PlanPass, spans: Iterator[RankRows], size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Make batches of ids and of what is real, without rows."""
    for ids, _, real in spans:
        for start in range(0, ids.size, size):
            yield ids[start : start + size], real[start : start + size]


def client_of(folder: Path, faults: list[str]) -> ScoreClient:
    return ScoreClient(FaultyChannel(make_spec(folder), faults))


def train_epochs(
    client: ScoreClient, folder: Path, generation: int, first: int, stop: int
) -> tuple[list[str], dict[str, Any]]:
    """Train epochs [first, stop) as workers do; return the plans' hashes and the last state."""
    channel = client.channel
    assert isinstance(channel, FaultyChannel)
    ranks, hashes = Ranks(client, generation), []
    for epoch in range(first, stop):
        header = ranks.record_epoch(epoch)
        hashes.append(header.hash)
        snapshot = ranks.meet("close", header.num_steps)
        channel.writing()
        state = {name: array.copy() for name, array in snapshot.state.items()}
        channel.writing = partial(save, folder, epoch + 1, state)
    channel.writing()
    return hashes, state


@pytest.fixture(autouse=True)
def small_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pushes a rank and epoch."""
    monkeypatch.setattr(recorder, "PUSH_ROWS", PUSH_ROWS)


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
        actor.observe(KEY, push(sequence, parts[sequence], 0))
    return actor, parts


CLOSE = Barrier("close", 0, 1)
KEY = AttemptKey(1, 0)


def final_scores(actor: ScoreActor) -> NDArray[Any]:
    snapshot = actor.pass_barrier(KEY, CLOSE)
    assert snapshot is not None
    return snapshot.state["table/column/loss"]


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


def test_the_lost_pushes_are_named(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, _ = half_recorded
    assert actor.arrive(KEY, CLOSE, 0, 3) == [1]
    assert actor.arrive(KEY, CLOSE, 0, 5) == [1, 3, 4]
    assert actor.arrive(KEY, CLOSE, 1, 2) == [0, 1]
    assert actor.arrive(KEY, CLOSE, 1, 0) == []


def test_a_repeated_push_changes_nothing(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, parts = half_recorded
    actor.arrive(KEY, CLOSE, 0, 0)
    once = final_scores(actor).copy()
    assert actor.progress()[1] == 0, "the epoch was closed"
    again = ScoreActor(actor._spec)
    again.announce(train_pass(0))
    for sequence in (0, 2, 0, 2, 2):
        again.observe(KEY, push(sequence, parts[sequence], 0))
    assert again.progress()[1] == 8
    # The second push of the same number holds other losses: it must not be folded.
    again.observe(KEY, push(0, parts[0], 1))
    again.arrive(KEY, CLOSE, 0, 0)
    assert np.array_equal(final_scores(again), once, equal_nan=True)


def test_an_epoch_does_not_close_before_all_is_in(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, parts = half_recorded
    both = Barrier("close", 7, 2)
    assert actor.arrive(KEY, both, 1, 0) == []
    assert actor.arrive(KEY, both, 0, 3) == [1]
    assert actor.pass_barrier(KEY, both) is None
    assert actor.absent_ranks(KEY, both) == [0]
    actor.observe(KEY, push(1, parts[1], 0))
    assert actor.arrive(KEY, both, 0, 3) == []
    assert actor.absent_ranks(KEY, both) == []
    snapshot = actor.pass_barrier(KEY, both)
    assert snapshot is not None
    again = actor.pass_barrier(KEY, both)
    assert again is not None, "an answer that got lost can be asked for again"
    assert np.array_equal(again.state["selection/bitmap"], snapshot.state["selection/bitmap"])
    with pytest.raises(StaleGeneration, match="epoch 0 in epoch 1"):
        actor.arrive(KEY, both, 0, 3)


def test_ranks_at_different_barriers_are_told_so(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, _ = half_recorded
    assert actor.arrive(KEY, Barrier("snapshot", 3, 2), 1, 0) == []
    with pytest.raises(ValueError, match=r"rank 0 is at step 5, the epoch's end, other ranks are at step 3: every"):
        actor.arrive(KEY, Barrier("close", 5, 2), 0, 0)


def test_rank_zero_alone_has_the_state(tmp_path: Path) -> None:
    ranks = Ranks(client_of(tmp_path, []), 1)
    ranks.record_epoch(0, share=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "broadcast_from_rank_zero", lambda value: value)
        for one in reversed(ranks.sessions):
            one._arrive(Barrier("snapshot", 2, RANKS))
        assert ranks.sessions[0].barrier("snapshot", 2, with_state=False).state == {}
    snapshot = ranks.meet("snapshot", 3)
    assert "table/column/loss" in snapshot.state
    assert "loss" in snapshot.score_quantiles


def test_an_answer_to_another_call_of_ray_is_noticed(tmp_path: Path) -> None:
    one = Ranks(client_of(tmp_path, []), 1).sessions[1]
    one.start_epoch(0)
    one.announce()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "broadcast_from_rank_zero", lambda _: "checkpoint_000001")
        with pytest.raises(RuntimeError, match="rank 1 waits at step 2 of epoch 0 and rank 0 called something else"):
            one.barrier("snapshot", 2)


def test_an_actor_that_forgot_who_had_come_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It dies between the arrivals of two ranks, the first of which already waits for rank 0's answer."""
    client = client_of(tmp_path, [])
    channel, ranks = client.channel, Ranks(client, 1)
    assert isinstance(channel, FaultyChannel)
    header = ranks.record_epoch(0)
    ranks.sessions[1]._arrive(Barrier("close", header.num_steps, RANKS))
    channel.actor = ScoreActor(make_spec(tmp_path))
    waits = ranks.sessions[1]
    waits._arrive, come = lambda _: setattr(waits, "_arrive", come), waits._arrive  # type: ignore[method-assign]
    state = ranks.meet("close", header.num_steps).state
    assert "rank 0 has been waiting for ranks [1]" in caplog.text
    expected = Selector(METHOD, NUM_SAMPLES, NUM_EPOCHS, SEED)
    ids = expected.begin_epoch(0).ids
    expected.observe(ids, {"loss": losses_of(0, NUM_SAMPLES)[ids]}, 0)
    assert np.array_equal(state["table/column/loss"], expected.state_dict()["table/column/loss"])


def test_an_older_generation_is_refused(half_recorded: tuple[ScoreActor, list[NDArray[np.int64]]]) -> None:
    actor, parts = half_recorded
    actor.announce(train_pass(0, 2))
    with pytest.raises(StaleGeneration, match="generation 1 was replaced by 2"):
        actor.arrive(KEY, CLOSE, 0, 1)
    with pytest.raises(StaleGeneration, match="generation 1"):
        actor.announce(train_pass(0))
    actor.observe(KEY, push(1, parts[1], 0))
    assert actor.progress()[1] == 0, "a push of the old generation was folded"


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_newer_generation_starts_from_the_checkpoint(tmp_path: Path, epoch: int) -> None:
    client = client_of(tmp_path, [])
    hashes, _ = train_epochs(client, tmp_path, 1, 0, epoch) if epoch else ([], {})
    Ranks(client, 1).record_epoch(epoch, share=0.5)  # what this attempt saw of the epoch is forgotten
    rest, state = train_epochs(client, tmp_path, 2, epoch, NUM_EPOCHS)
    assert_equals_oracle(tmp_path, hashes + rest, state)


def test_a_restarted_actor_waits_for_the_checkpoint_that_is_being_written(tmp_path: Path) -> None:
    client = client_of(tmp_path, [])
    _, state = train_epochs(client, tmp_path, 1, 0, 1)
    (tmp_path / "checkpoints" / "epoch-000001" / "manifest.json").unlink()
    restarted = ScoreActor(make_spec(tmp_path))
    with pytest.raises(CheckpointPending, match="before step 0 of epoch 1 is not written yet"):
        restarted.announce(train_pass(1))
    restarted.observe(
        AttemptKey(1, 1), push(0, np.arange(4), 1)
    )  # refused without a word: the flush will find it missing
    save(tmp_path, 1, state)
    assert restarted.arrive(AttemptKey(1, 1), CLOSE, 0, 1) == [0]
    assert restarted.announce(train_pass(1)).hash == client.announce(train_pass(1)).hash


def test_selector_and_score_actor_agree(tmp_path: Path) -> None:
    hashes, state = train_epochs(client_of(tmp_path, []), tmp_path, 1, 0, NUM_EPOCHS)
    assert_equals_oracle(tmp_path, hashes, state)
    assert len(set(hashes)) == NUM_EPOCHS
    assert read_selection(tmp_path, 1).realised > 0


FAULTS = st.lists(st.sampled_from(["none", "none", "lose", "twice", "late", "restart", "forget"]), max_size=80)


@given(FAULTS)
def test_no_schedule_of_faults_changes_scores_or_selections(faults: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hashes, state = train_epochs(client_of(folder, faults), folder, 1, 0, NUM_EPOCHS)
        assert_equals_oracle(folder, hashes, state)


@pytest.mark.parametrize("fault", ["lose", "twice", "late", "restart", "forget"])
@pytest.mark.parametrize("period", [2, 3, 7])
def test_a_fault_at_every_kth_message(tmp_path: Path, fault: str, period: int) -> None:
    faults = [fault if number % period == 0 else "none" for number in range(100)]
    hashes, state = train_epochs(client_of(tmp_path, faults), tmp_path, 1, 0, NUM_EPOCHS)
    assert_equals_oracle(tmp_path, hashes, state)
