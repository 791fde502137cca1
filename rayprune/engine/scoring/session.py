"""One rank's session with the ScoreActor during an attempt: announce passes, get batches, record, meet at barriers.

The engine's worker and a user's Shard hold one session each. The session does not know how rows reach the rank: the
iteration over batches is passed in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Generic, TypeVar

from ray.train.collective import broadcast_from_rank_zero

from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import (
    AttemptKey,
    Barrier,
    EpochSnapshot,
    Moment,
    Phase,
    PlanHeader,
    PlanPass,
    RankRows,
)
from rayprune.engine.scoring.recorder import Recorder
from rayprune.errors import UsageError

logger = logging.getLogger(__name__)

Client = TypeVar("Client", bound=ScoreClient)
T = TypeVar("T")

# Rows of the plan per request: enough to amortize the call, few enough to hold.
SPAN_ROWS = 65_536
_FIRST_POLL_S, _LONGEST_POLL_S = 0.001, 0.05
# How long rank 0 waits for the other ranks before all ranks arrive again.
_ARRIVAL_TIMEOUT_S = 10.0


class ScoringSession(Generic[Client]):
    """One rank's session with the ScoreActor.

    Args:
        client: the ScoreActor's client.
        generation: the attempt's number, the same on every rank.
        rank: this rank.
        world_size: the number of ranks.
        signals: names of the signals that training visits report.

    Attributes:
        client, generation, rank, world_size: as passed.
        recorder: records this rank's observations.
        key: the attempt in the current epoch.
    """

    def __init__(
        self, client: Client, generation: int, rank: int, world_size: int, signals: tuple[str, ...] = ()
    ) -> None:
        self.client, self.generation, self.rank, self.world_size = client, generation, rank, world_size
        self.recorder = Recorder(client, rank, signals)
        self.key = AttemptKey(generation, 0)
        self._num_barriers = 0

    def start_epoch(self, epoch: int, resume_step: int = 0) -> None:
        """Start an epoch at the step where this attempt resumes it."""
        self.key, self._num_barriers = AttemptKey(self.generation, epoch, resume_step), 0
        self.recorder.start_epoch(self.key)

    def announce(self, phase: Phase = "train") -> PlanHeader:
        """Announce a pass over one of the epoch's plans; all ranks announce the same passes."""
        start_step = self.key.resume_step if phase == "train" else 0
        return self.client.announce(PlanPass(self.key, phase, self.world_size, start_step))

    def batches(
        self, header: PlanHeader, deliver: Callable[[PlanPass, Iterator[RankRows], int], Iterator[T]]
    ) -> Iterator[T]:
        """Yield this rank's batches of an announced pass.

        Args:
            header: the result of `announce`.
            deliver: called with the pass, this rank's rows of its plan in order, and the rows of a batch; yields the
                batches.
        """
        plan_pass, stop = header.plan_pass, header.num_steps
        steps = max(1, SPAN_ROWS // header.batch_rows)

        def spans() -> Iterator[RankRows]:
            for start in range(plan_pass.start_step, stop, steps):
                yield self.client.rank_rows(plan_pass, self.rank, start, min(start + steps, stop))

        if plan_pass.start_step < stop:
            yield from deliver(plan_pass, spans(), header.batch_rows)

    def barrier(self, moment: Moment, step: int, *, with_state: bool = True) -> EpochSnapshot:
        """Wait for all ranks and all their observations, then take a snapshot.

        The other ranks wait until rank 0 has the snapshot, so that none of them changes the state meanwhile.

        Args:
            moment: `snapshot` inside an epoch; `close` at its end, where the actor selects the next epoch's samples.
            step: the number of steps before the barrier in the epoch; the same on every rank.
            with_state: whether rank 0 needs the state.

        Returns:
            The snapshot. On ranks other than 0, `state` and `score_quantiles` are empty.

        Raises:
            UsageError: another rank is at another barrier.
            ObservationsLost: the ScoreActor died with observations that cannot be repeated.
        """
        barrier = Barrier(moment, step, self.world_size, self._num_barriers)
        self._num_barriers += 1
        while True:
            self._arrive(barrier)
            snapshot = self._pass(barrier, with_state) if self.rank == 0 else None
            outcome = self._broadcast(barrier, snapshot)
            if outcome is not None:
                return snapshot or outcome
            # The actor may have been restarted and have forgotten some arrivals: all ranks arrive again.

    def _arrive(self, barrier: Barrier) -> None:
        """Push the remaining observations, repeat the lost ones, and arrive.

        Repeated pushes are awaited: here an observation that the actor cannot fold raises its error.
        """
        self.recorder.push()
        while lost := self.client.arrive(self.key, barrier, self.rank, self.recorder.num_pushes):
            self.recorder.push_again(lost)

    def _pass(self, barrier: Barrier, with_state: bool) -> EpochSnapshot | None:
        """Wait for the other ranks and take the snapshot (rank 0); None if they do not arrive in time."""
        start, pause_s = time.monotonic(), _FIRST_POLL_S
        while (snapshot := self.client.pass_barrier(self.key, barrier, with_state)) is None:
            absent = self.client.absent_ranks(self.key, barrier)
            if self.rank in absent:  # the actor was restarted
                return None
            if time.monotonic() - start > _ARRIVAL_TIMEOUT_S:
                logger.warning(
                    "rank 0 has been waiting for ranks %s for %.0f s: every rank must finish the epoch, or call "
                    "state_dict() at the same step",
                    absent,
                    _ARRIVAL_TIMEOUT_S,
                )
                return None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        return snapshot

    def _broadcast(self, barrier: Barrier, snapshot: EpochSnapshot | None) -> EpochSnapshot | None:
        """Return rank 0's snapshot without its arrays on every rank, or None if rank 0 has none."""
        if self.world_size == 1:
            return snapshot
        summary = None if snapshot is None else replace(snapshot, state={}, score_quantiles={})
        message = broadcast_from_rank_zero((barrier, summary))
        if not isinstance(message, tuple) or message[:1] != (barrier,):  # rank 0 is in another collective of Ray Train
            raise UsageError(
                f"rank {self.rank} is at {barrier} in epoch {self.key.epoch}, and rank 0 called something else: every "
                "rank must call state_dict() and ray.train.report() in the same order"
            )
        outcome: EpochSnapshot | None = message[1]
        return outcome
