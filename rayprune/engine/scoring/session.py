"""One rank's conversation with the ScoreActor during an attempt: announce, batches, record, barrier.

The engine's own worker and a user's Shard hold one each. Nothing here knows how rows reach the rank: the iteration over
batches is passed in.
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

logger = logging.getLogger(__name__)

Client = TypeVar("Client", bound=ScoreClient)
T = TypeVar("T")

# Rows that a rank asks the plan for at once: enough to make the cost of a call vanish, little to hold.
SPAN_ROWS = 65_536
_FIRST_POLL_S, _LONGEST_POLL_S = 0.001, 0.05
# How long rank 0 waits for the others before all ranks come anew.
_MEET_S = 10.0


class ScoringSession(Generic[Client]):
    """Follow an attempt's epochs on one rank.

    Args:
        client: the ScoreActor's client.
        generation: the attempt's number, the same on every rank.
        rank: this rank.
        world_size: how many ranks there are.
        signals: what training visits report.

    Attributes:
        client, generation, rank, world_size: as given.
        recorder: this rank's observations.
        key: the running epoch.
    """

    def __init__(
        self, client: Client, generation: int, rank: int, world_size: int, signals: tuple[str, ...] = ()
    ) -> None:
        self.client, self.generation, self.rank, self.world_size = client, generation, rank, world_size
        self.recorder = Recorder(client, rank, signals)
        self.key = AttemptKey(generation, 0)

    def start_epoch(self, epoch: int, resume_step: int = 0) -> None:
        """Begin an epoch, at the step where this attempt resumes it."""
        self.key = AttemptKey(self.generation, epoch, resume_step)
        self.recorder.start_epoch(self.key)

    def announce(self, phase: Phase = "train") -> PlanHeader:
        """Announce a pass over one of the epoch's plans; every rank announces the same."""
        start_step = self.key.resume_step if phase == "train" else 0
        return self.client.announce(PlanPass(self.key, phase, self.world_size, start_step))

    def batches(
        self, header: PlanHeader, deliver: Callable[[PlanPass, Iterator[RankRows], int], Iterator[T]]
    ) -> Iterator[T]:
        """Yield this rank's batches of an announced pass.

        Args:
            header: what `announce` returned.
            deliver: makes batches of the pass, this rank's rows of its plan in order, and the rows of a batch.
        """
        plan_pass, last = header.plan_pass, header.num_steps
        steps = max(1, SPAN_ROWS // header.batch_rows)

        def spans() -> Iterator[RankRows]:
            for start in range(plan_pass.start_step, last, steps):
                yield self.client.rank_rows(plan_pass, self.rank, start, min(start + steps, last))

        if plan_pass.start_step < last:
            yield from deliver(plan_pass, spans(), header.batch_rows)

    def barrier(self, moment: Moment, step: int, *, with_state: bool = True) -> EpochSnapshot:
        """Wait until every rank is here and all their observations have arrived.

        Nothing reaches the ScoreActor while rank 0 takes the state, as the other ranks wait for its answer.

        Args:
            moment: `snapshot` inside an epoch; `close` at its end, when the next epoch's samples are selected.
            step: the step before which the ranks meet; all must agree.
            with_state: whether rank 0 needs the state.

        Returns:
            The snapshot; `state` and `score_quantiles` are empty on the other ranks.

        Raises:
            ValueError: another rank is at another barrier.
            ObservationsLost: the ScoreActor was lost with observations that nobody else has.
        """
        barrier = Barrier(moment, step, self.world_size)
        while True:
            self._arrive(barrier)
            snapshot = self._pass(barrier, with_state) if self.rank == 0 else None
            outcome = self._from_rank_zero(barrier, snapshot)
            if outcome is not None:
                return snapshot or outcome
            # Rank 0 waited in vain: the ScoreActor may have been restarted and forgotten who had come.

    def _arrive(self, barrier: Barrier) -> None:
        """Push what is left, and what the actor misses, until it has everything.

        Repeated pushes are waited for: an observation that the actor cannot fold raises here.
        """
        self.recorder.push()
        while missing := self.client.arrive(self.key, barrier, self.rank, self.recorder.num_pushes):
            self.recorder.push_again(missing)

    def _pass(self, barrier: Barrier, with_state: bool) -> EpochSnapshot | None:
        """Wait a while for the other ranks, then take the snapshot; None when they have not come (rank 0)."""
        start, pause_s = time.monotonic(), _FIRST_POLL_S
        while (snapshot := self.client.pass_barrier(self.key, barrier, with_state)) is None:
            absent = self.client.absent_ranks(self.key, barrier)
            if self.rank in absent:
                return None
            if time.monotonic() - start > _MEET_S:
                logger.warning(
                    "rank 0 has been waiting for ranks %s for %.0f s: every rank must finish the epoch, or call "
                    "state_dict() at the same step",
                    absent,
                    _MEET_S,
                )
                return None
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        return snapshot

    def _from_rank_zero(self, barrier: Barrier, snapshot: EpochSnapshot | None) -> EpochSnapshot | None:
        """Return rank 0's snapshot without its arrays, or None when rank 0 has none."""
        if self.world_size == 1:
            return snapshot
        small = None if snapshot is None else replace(snapshot, state={}, score_quantiles={})
        answer = broadcast_from_rank_zero((barrier, small))
        if not isinstance(answer, tuple) or answer[:1] != (barrier,):  # another collective call of Ray Train
            raise RuntimeError(
                f"rank {self.rank} waits at step {barrier.step} of epoch {self.key.epoch} and rank 0 called something "
                "else: every rank must call state_dict() and ray.train.report() in the same order"
            )
        outcome: EpochSnapshot | None = answer[1]
        return outcome
