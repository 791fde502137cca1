"""Sessions of two ranks: whatever messages are lost, repeated or late, scores and selections stay exact."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from rayprune.engine.scoring import recorder, session
from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.channel import LocalChannel
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, Barrier, EpochSnapshot, Moment, PlanHeader, PlanPass, RankRows
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.scoring.shards import ScoreShard, ShardGroup, shard_rows
from rayprune.engine.storage.run_folder import read_selection
from rayprune.errors import CheckpointPending, UsageError
from tests.support.runs import losses_of
from tests.unit.engine.scoring.scored_run import BATCH, METHOD, NUM_EPOCHS, NUM_SAMPLES, RANKS, SEED, make_spec, save

PUSH_ROWS = 4


class Faults:
    """A schedule of faults, one for each message to any of the actors; after it, everything arrives.

    Attributes:
        write: writes the newest checkpoint.
    """

    def __init__(self, schedule: list[str]) -> None:
        self.write: Callable[[], object] = lambda: None
        self.schedule(schedule)

    def schedule(self, faults: list[str]) -> None:
        """Start a schedule."""
        self._schedule = iter(faults)

    def next(self) -> str:
        """Return the next message's fault."""
        return next(self._schedule, "none")


class FaultyChannel(LocalChannel):
    """A channel with a schedule of faults.

    Faults: "lose" a push, deliver it "twice" or "late" (after the next awaited call), "restart" the actor before the
    call, or "forget": the actor dies just after it has answered, and Ray repeats the call on the next one. A checkpoint
    stays unwritten until an actor needs it or the next one comes.
    """

    def __init__(self, make: Callable[[], Any], faults: Faults) -> None:
        super().__init__(make())
        self._make, self._faults = make, faults
        self._late: list[tuple[Any, ...]] = []
        self._lock = threading.RLock()

    def restart(self) -> None:
        """Replace the actor by a new one."""
        self.actor = self._make()

    def _perform(self, method: str, *args: Any) -> Any:
        fault = self._faults.next()
        if fault == "restart":
            self.restart()
        answer = getattr(self.actor, method)(*args)
        if fault == "twice" and method == "observe":
            self.actor.observe(*args)
        if fault == "forget":
            self.restart()
            answer = getattr(self.actor, method)(*args)
        return answer

    def call(self, method: str, *args: Any) -> Any:
        with self._lock:
            try:
                answer = self._perform(method, *args)
            except CheckpointPending:
                self._faults.write()
                answer = self._perform(method, *args)
            late, self._late = self._late, []
            for push in reversed(late):
                self.actor.observe(*push)
            return answer

    def post(self, method: str, *args: Any) -> None:
        with self._lock:
            fault = self._faults.next()
            if fault == "late":
                self._late.append(args)
            elif fault != "lose":
                self._perform(method, *args)


class Ranks:
    """The sessions of an attempt. At a barrier each runs in a thread, and broadcasts work as Ray Train's do."""

    def __init__(self, folder: Path, faults: list[str], generation: int = 1, num_shards: int = 1) -> None:
        self.faults, spec, group = Faults(faults), make_spec(folder), None
        if num_shards > 1:
            rows = [shard_rows(NUM_SAMPLES, num_shards, index) for index in range(num_shards)]
            shards = [FaultyChannel(partial(ScoreShard, spec, one), self.faults) for one in rows]
            group = ShardGroup(tuple(shards), NUM_SAMPLES)
        self.channel = FaultyChannel(partial(ScoreActor, replace(spec, shards=group)), self.faults)
        self.client = ScoreClient(self.channel, group)
        self._folder, self._rank, self._both = folder, threading.local(), threading.Barrier(RANKS, timeout=20)
        self._message: Any = None
        self.start(generation)

    def start(self, generation: int) -> None:
        """Start an attempt."""
        self.sessions = [ScoringSession(self.client, generation, rank, RANKS, ("loss",)) for rank in range(RANKS)]

    def record_epoch(self, epoch: int, fraction: float = 1.0) -> PlanHeader:
        """Let every rank record a part of its rows, as workers do; return the plan's header."""
        for one in self.sessions:
            one.start_epoch(epoch)
            header = one.announce()
            steps = int(header.num_steps * fraction)
            for ids, real in itertools.islice(one.batches(header, cut_batches), steps):
                one.recorder.record(ids, real, {"loss": torch.from_numpy(losses_of(epoch, NUM_SAMPLES)[ids])})
        return header

    def meet(self, moment: Moment, step: int) -> EpochSnapshot:
        """Take all ranks through a barrier; return rank 0's snapshot."""
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(RANKS) as pool:
            patch.setattr(session, "broadcast_from_rank_zero", self._broadcast)
            patch.setattr(session, "_ARRIVAL_TIMEOUT_S", 0.02)
            snapshots = [pool.submit(self._barrier, one, moment, step) for one in self.sessions]
            snapshot, *_ = [future.result() for future in snapshots]
        return snapshot

    def train(self, first: int, stop: int) -> tuple[list[str], dict[str, Any]]:
        """Train epochs [first, stop); return the plans' hashes and the last state."""
        hashes = []
        for epoch in range(first, stop):
            header = self.record_epoch(epoch)
            hashes.append(header.hash)
            snapshot = self.meet("close", header.num_steps)
            self.faults.write()
            state = {name: array.copy() for name, array in snapshot.state.items()}
            self.faults.write = partial(save, self._folder, epoch + 1, state)
        self.faults.write()
        return hashes, state

    def _barrier(self, one: ScoringSession[ScoreClient], moment: Moment, step: int) -> EpochSnapshot:
        self._rank.number = one.rank
        return one.barrier(moment, step)

    def _broadcast(self, message: Any) -> Any:
        if self._rank.number == 0:
            self._message = message
        self._both.wait()
        received = self._message
        self._both.wait()
        return received


def cut_batches(
    _: PlanPass, spans: Iterator[RankRows], size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield (ids, real) of each batch."""
    for ids, _, real in spans:
        for start in range(0, ids.size, size):
            yield ids[start : start + size], real[start : start + size]


@pytest.fixture(autouse=True)
def small_pushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pushes per rank and epoch."""
    monkeypatch.setattr(recorder, "PUSH_ROWS", PUSH_ROWS)


def assert_exact(folder: Path, hashes: list[str], state: dict[str, Any]) -> None:
    """Plans, state and written selections are those of a Selector that observes each kept sample once per epoch."""
    selector, expected_hashes = Selector(METHOD, NUM_SAMPLES, NUM_EPOCHS, SEED), []
    for epoch in range(NUM_EPOCHS):
        selection = selector.begin_epoch(epoch)
        expected_hashes.append(Plan.of_selection(selection, BATCH, SEED, epoch).hash)
        assert np.array_equal(read_selection(folder, epoch).codes, selection.codes), epoch
        selector.observe(selection.ids, {"loss": losses_of(epoch, NUM_SAMPLES)[selection.ids]}, epoch)
    assert hashes == expected_hashes
    expected = selector.state_dict()
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(state[name], array, equal_nan=array.dtype.kind == "f"), name


# One actor; shards of unequal sizes; more shards than rows in a push, most of them with one sample.
SHARDS = (1, 3, NUM_SAMPLES - 1)


@pytest.mark.parametrize("num_shards", SHARDS)
def test_the_actor_and_a_selector_agree(tmp_path: Path, num_shards: int) -> None:
    hashes, state = Ranks(tmp_path, [], num_shards=num_shards).train(0, NUM_EPOCHS)
    assert_exact(tmp_path, hashes, state)
    assert len(set(hashes)) == NUM_EPOCHS
    assert read_selection(tmp_path, 1).realised > 0


FAULTS = st.lists(st.sampled_from(["none", "none", "lose", "twice", "late", "restart", "forget"]), max_size=80)


@pytest.mark.parametrize("num_shards", [1, 2])
@given(faults=FAULTS)
def test_no_schedule_of_faults_changes_scores_or_selections(num_shards: int, faults: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        hashes, state = Ranks(Path(name), faults, num_shards=num_shards).train(0, NUM_EPOCHS)
        assert_exact(Path(name), hashes, state)


@pytest.mark.parametrize("fault", ["lose", "twice", "late", "restart", "forget"])
@pytest.mark.parametrize("period", [2, 3, 7])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_fault_at_every_kth_message_changes_nothing(tmp_path: Path, fault: str, period: int, num_shards: int) -> None:
    faults = [fault if number % period == 0 else "none" for number in range(100 * num_shards)]
    hashes, state = Ranks(tmp_path, faults, num_shards=num_shards).train(0, NUM_EPOCHS)
    assert_exact(tmp_path, hashes, state)


@pytest.mark.parametrize("fault", ["restart", "forget"])
def test_a_shard_that_restarts_after_the_ranks_have_arrived_changes_nothing(tmp_path: Path, fault: str) -> None:
    """At every message of a barrier at the end of an epoch, whether it is to a shard or to the ScoreActor."""
    for num_before in range(30):
        folder = tmp_path / str(num_before)
        folder.mkdir()
        ranks = Ranks(folder, [], num_shards=2)
        hashes, state = ranks.train(0, 2)
        header = ranks.record_epoch(2)
        ranks.faults.schedule([*["none"] * num_before, fault])
        snapshot = ranks.meet("close", header.num_steps)
        ranks.faults.write = partial(save, folder, 3, {name: array.copy() for name, array in snapshot.state.items()})
        rest, state = ranks.train(3, NUM_EPOCHS)
        assert_exact(folder, [*hashes, header.hash, *rest], state)


def test_a_rank_that_arrives_just_after_rank_0_missed_it_leaves_the_state_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, [], num_shards=2)
    missed, arrived = threading.Event(), threading.Event()
    look, arrive = ranks.client.absent_ranks, ranks.client.arrive

    def look_too_early(key: AttemptKey, barrier: Barrier) -> list[int]:
        absent = look(key, barrier)
        missed.set()
        assert arrived.wait(20)
        return absent

    def arrive_late(key: AttemptKey, barrier: Barrier, rank: int, num_pushes: int) -> list[int]:
        if rank == 0:
            return arrive(key, barrier, rank, num_pushes)
        assert missed.wait(20)
        lost = arrive(key, barrier, rank, num_pushes)
        arrived.set()
        return lost

    monkeypatch.setattr(ranks.client, "absent_ranks", look_too_early)
    monkeypatch.setattr(ranks.client, "arrive", arrive_late)
    header = ranks.record_epoch(0)
    state = ranks.meet("close", header.num_steps).state
    assert {"table/last_visit", "table/times_pruned", "table/column/loss"} <= state.keys(), state.keys()


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_new_attempt_starts_from_the_checkpoint(tmp_path: Path, epoch: int, num_shards: int) -> None:
    ranks = Ranks(tmp_path, [], num_shards=num_shards)
    hashes, _ = ranks.train(0, epoch) if epoch else ([], {})
    ranks.record_epoch(epoch, fraction=0.5)  # this attempt ends here, and its half epoch is forgotten
    ranks.start(generation=2)
    rest, state = ranks.train(epoch, NUM_EPOCHS)
    assert_exact(tmp_path, hashes + rest, state)


def test_ranks_arrive_again_if_the_actor_forgot_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The actor dies between the arrivals of two ranks, when the first one already waits for rank 0's broadcast."""
    ranks = Ranks(tmp_path, [])
    header, late = ranks.record_epoch(0), ranks.sessions[1]
    barrier = Barrier("close", header.num_steps, RANKS)
    late._arrive(barrier)
    ranks.channel.restart()
    late._arrive, arrive = lambda _: setattr(late, "_arrive", arrive), late._arrive  # type: ignore[method-assign]
    state = ranks.meet("close", header.num_steps).state
    assert "rank 0 has been waiting for ranks [1]" in caplog.text
    expected = Selector(METHOD, NUM_SAMPLES, NUM_EPOCHS, SEED)
    ids = expected.begin_epoch(0).ids
    expected.observe(ids, {"loss": losses_of(0, NUM_SAMPLES)[ids]}, 0)
    assert np.array_equal(state["table/column/loss"], expected.state_dict()["table/column/loss"])


def test_rank_zero_gets_the_state_if_it_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(tmp_path, [])
    ranks.record_epoch(0, fraction=0.5)
    snapshot = ranks.meet("snapshot", 2)
    assert "table/column/loss" in snapshot.state
    assert "loss" in snapshot.score_quantiles
    monkeypatch.setattr(session, "broadcast_from_rank_zero", lambda message: message)
    ranks.sessions[1]._arrive(Barrier("snapshot", 3, RANKS, 1))
    assert ranks.sessions[0].barrier("snapshot", 3, with_state=False).state == {}


def test_a_rank_in_another_collective_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Ranks(tmp_path, []).sessions[1]
    one.start_epoch(0)
    one.announce()
    monkeypatch.setattr(session, "broadcast_from_rank_zero", lambda _: "checkpoint_000001")
    with pytest.raises(UsageError, match="rank 1 is at step 2 in epoch 0, and rank 0 called something else"):
        one.barrier("snapshot", 2)
