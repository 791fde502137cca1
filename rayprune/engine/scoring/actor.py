"""The ScoreActor: a run's Selector behind calls, with exactly-once observations.

`ScoreActor` knows nothing of Ray. With workers it runs as a Ray actor (single-threaded, restarted without limit),
without them as an object of the training process; both give identical selections.

Ray acknowledges calls that a dying actor then loses, so observations are made exact here. Workers log what they push in
an epoch. At a barrier the actor names the pushes it misses and drops those it has seen. The first call of a newer
attempt, or the first call after a restart, restores the state at the attempt's resume step from the checkpoint.

Where the score table is too large for one actor, `shards` hold it, and receive the observations. The ScoreActor then
reads the columns that a selection needs.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.plan import Plan, block_rows
from rayprune.core.selector import MAX_NONFINITE_IDS, Selector
from rayprune.core.table import column_quantiles
from rayprune.engine.scoring.messages import (
    AttemptKey,
    Barrier,
    EpochSnapshot,
    Phase,
    PlanBlock,
    PlanHeader,
    PlanPass,
    Pulse,
    Push,
    RankRows,
    ReceivedPushes,
    StopReason,
)
from rayprune.engine.scoring.shards import Incarnations, ShardedTable, ShardRestarted, joined_facts
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import restore_selector
from rayprune.engine.storage.run_folder import write_selection
from rayprune.errors import CheckpointPending, ObservationsLost, StaleGeneration, UsageError
from rayprune.paths import as_path

logger = logging.getLogger(__name__)


class ScoreActor:
    """Aggregate the observations of all ranks and plan every epoch."""

    def __init__(self, spec: ScoreSpec) -> None:
        self._spec = spec
        self._generation = 0
        self._selector: Selector | None = None
        # The current epoch: the received pushes, the announced pass and its plan, who is at which barrier.
        self._pushes = ReceivedPushes()
        self._pass: PlanPass | None = None
        self._was_announced = False
        self._plan: Plan | None = None
        self._barrier: Barrier | None = None
        self._arrived: set[int] = set()
        self._passed: tuple[AttemptKey, Barrier] | None = None
        # With shards: the newest admitted key, the shards' incarnations when the ranks arrived, and at the last barrier
        # the quantiles; the non-finite signals before the epoch.
        self._key = AttemptKey(0, 0)
        self._incarnations: Incarnations = ()
        self._quantiles: dict[str, list[float]] = {}
        self._nonfinite_before: tuple[int, list[int]] = (0, [])
        # Signals between driver and workers.
        self._stop_reason: StopReason | None = None
        self._pausing = False
        self._pulses: dict[int, tuple[float, str, float]] = {}
        self._pulse_generation = 0

    def _enter(self, key: AttemptKey) -> Selector:
        """Admit a call; the first one of a newer attempt restores the state at the attempt's resume step."""
        if key.generation < self._generation:
            raise StaleGeneration(f"generation {key.generation} was replaced by {self._generation}")
        if key.generation > self._generation or self._selector is None:
            self._key = key
            self._selector, self._generation = self._state_before(key.epoch, key.resume_step), key.generation
            self._start_epoch()
        if key.epoch != self._selector.epoch:
            raise StaleGeneration(f"a call of epoch {key.epoch} came in epoch {self._selector.epoch}")
        self._key = key
        return self._selector

    def _state_before(self, epoch: int, step: int) -> Selector:
        """Return the Selector as it was before a step, from its checkpoint; a fresh one at the start of the run."""
        table = None if self._spec.shards is None else ShardedTable(self._spec, self._fetch)
        selector = self._spec.selector(table)
        checkpoint = self._spec.checkpoint_before(epoch, step)
        if checkpoint is not None:
            restore_selector(selector, checkpoint, leave_out=() if table is None else table.remote)
        self._incarnations = ()
        selector.begin_epoch(epoch)
        if table is not None:
            table.forget()
        return selector

    def _fetch(self, name: str) -> NDArray[Any]:
        """Return an array of the table from the shards."""
        assert self._spec.shards is not None
        incarnations, array = self._spec.shards.fetch(self._key, name)
        self._check_shards(incarnations)
        return array

    def _check_shards(self, incarnations: Incarnations) -> None:
        if self._incarnations and incarnations != self._incarnations:
            raise ShardRestarted

    def _start_epoch(self) -> None:
        self._pushes, self._incarnations = ReceivedPushes(), ()
        self._pass = self._plan = self._barrier = None
        if self._selector is not None:
            self._nonfinite_before = (self._selector.num_nonfinite, list(self._selector.nonfinite_ids))

    def announce(self, plan_pass: PlanPass) -> PlanHeader:
        """Lay out the plan of a pass. Every rank announces the pass; the first call makes the plan."""
        selector = self._enter(plan_pass.key)
        start = time.perf_counter()
        if plan_pass != self._pass or self._plan is None:
            self._plan = self._make_plan(selector, plan_pass)
            self._pass, self._was_announced = plan_pass, True
        selection = selector.begin_epoch(plan_pass.key.epoch)
        return PlanHeader(
            plan_pass=plan_pass,
            num_steps=self._plan.num_steps,
            num_rows=self._plan.num_rows,
            num_kept=selection.num_kept,
            num_samples=selection.num_samples,
            num_forward_only=selection.num_scored,
            requested=selection.requested,
            realised=selection.realised,
            mean_weight=selection.mean_weight,
            lr_scale=selection.lr_scale,
            hash=self._plan.hash if plan_pass.phase == "train" else "",
            select_s=time.perf_counter() - start,
            facts=selection.facts,
            num_train_steps=self._plan.num_train_steps,
            batch_rows=self._spec.batch_size // plan_pass.world_size,
            meta_every=self._plan.meta_every,
        )

    def _make_plan(self, selector: Selector, plan_pass: PlanPass) -> Plan:
        spec, epoch = self._spec, plan_pass.key.epoch
        if plan_pass.phase == "validate":
            return Plan.in_order(spec.num_validation, spec.batch_size)
        selection = selector.begin_epoch(epoch)
        if plan_pass.phase == "forward":
            return Plan.in_order(selection.num_samples, spec.batch_size, selection.scored_ids)
        groups, window_rows = spec.source.groups, block_rows(spec.row_bytes)
        return Plan.of_selection(
            selection,
            spec.batch_size,
            spec.seed,
            epoch,
            spec.last_batch,
            groups=groups,
            window_rows=window_rows,
            meta_every=spec.meta_every,
        )

    def rank_rows(self, plan_pass: PlanPass, rank: int, start_step: int, stop_step: int) -> RankRows:
        """Return one rank's rows of the steps [start_step, stop_step) of an announced pass."""
        if plan_pass != self._pass:  # after a restart
            self.announce(plan_pass)
        assert self._plan is not None
        return self._plan.rank_rows(rank, plan_pass.world_size, start_step, stop_step)

    def blocks(self) -> tuple[Phase | None, list[PlanBlock]]:
        """Return the phase of the current pass and its blocks for Ray Data; no blocks before the first pass."""
        if self._pass is None or self._plan is None:
            return "train", []
        current, plan = self._pass, self._plan
        blocks = plan.blocks(current.world_size, self._spec.row_bytes, current.start_step, self._spec.task_rows)
        rows = [plan.rank_rows(b.rank, current.world_size, b.start_step, b.stop_step)[:2] for b in blocks]
        return current.phase, rows

    def observe(self, key: AttemptKey, push: Push) -> None:
        """Fold one push into the table, once."""
        try:
            selector = self._enter(key)
        except (StaleGeneration, CheckpointPending, ObservationsLost) as error:  # the next barrier names it as missing
            logger.info("refused a push: %s", error)
            return
        self._pushes.fold(push, key.epoch, selector.observe)

    def arrive(
        self, key: AttemptKey, barrier: Barrier, rank: int, num_pushes: int, incarnations: Incarnations = ()
    ) -> list[int]:
        """Register a rank at a barrier once all its pushes have arrived.

        Args:
            key: the attempt and the epoch.
            barrier: the barrier that the rank has reached.
            rank: the rank.
            num_pushes: pushes the rank has sent to this actor in this epoch.
            incarnations: the shards', which have all pushes.

        Returns:
            The numbers of its lost pushes, to be repeated before the next call; empty if the rank is registered.

        Raises:
            UsageError: another rank is at another barrier.
        """
        if (key, barrier) == self._passed:
            return []  # a repeated call whose answer was lost
        self._enter(key)
        if lost := self._pushes.lost(rank, num_pushes):
            return lost
        if barrier != self._barrier:
            if self._barrier is not None:
                raise UsageError(
                    f"rank {rank} is at {barrier}, another rank is at {self._barrier}: every rank must take the same "
                    "batches and call state_dict() at the same step"
                )
            self._barrier, self._arrived = barrier, set()
        if incarnations != self._incarnations:
            self._incarnations, self._arrived = incarnations, set()
        self._arrived.add(rank)
        return []

    def absent_ranks(self, key: AttemptKey, barrier: Barrier) -> list[int]:
        """Return the ranks that have not arrived at a barrier; all of them after a restart."""
        self._enter(key)
        return sorted(set(range(barrier.world_size)) - (self._arrived if barrier == self._barrier else set()))

    def pass_barrier(self, key: AttemptKey, barrier: Barrier, with_state: bool = True) -> EpochSnapshot | None:
        """Return the state at a barrier; at the end of an epoch, select the next epoch's samples.

        Rank 0 calls it while the other ranks wait, so that nothing changes before rank 0 has the state.

        Returns:
            The snapshot, or None while ranks are absent. With shards, `state` lacks the arrays that they have.
        """
        if (key, barrier) == self._passed:
            return self._snapshot(0.0, with_state)  # a repeated call whose answer was lost
        if self.absent_ranks(key, barrier):
            return None
        try:
            self._ask_shards()
            select_s = self._close_epoch(key.epoch) if barrier.moment == "close" else 0.0
        except ShardRestarted:
            self._arrived = set()  # all ranks repeat what the shard has lost
            return None
        self._barrier, self._passed = None, (key, barrier)
        return self._snapshot(select_s, with_state)

    def _ask_shards(self) -> None:
        """Take from the shards, if there are any, what a snapshot reports."""
        if self._spec.shards is None:
            return
        assert self._selector is not None
        facts = self._spec.shards.facts(self._key)
        self._check_shards(tuple(one.incarnation for one in facts))
        number, ids, self._quantiles = joined_facts(facts)
        own = self._selector.observations
        own.num_nonfinite = self._nonfinite_before[0] + number
        own.nonfinite_ids = (self._nonfinite_before[1] + ids)[:MAX_NONFINITE_IDS]

    def _close_epoch(self, epoch: int) -> float:
        """Write the epoch's selection and make the next one; return the seconds spent selecting."""
        assert self._selector is not None
        if self._spec.run_folder is not None:
            folder = as_path(self._spec.run_folder)
            write_selection(folder, epoch, self._selector.begin_epoch(epoch), self._spec.keep_selections)
        start = time.perf_counter()
        self._selector.end_sweep()
        if epoch + 1 < self._spec.num_epochs:
            self._pass = self._plan = None  # free the plan first: at a billion samples it has 4 GB
            self._selector.begin_epoch(epoch + 1)
            if isinstance(self._selector.table, ShardedTable):
                self._selector.table.forget()
            self._start_epoch()
        return time.perf_counter() - start

    def _snapshot(self, select_s: float, with_state: bool) -> EpochSnapshot:
        selector = self._selector
        assert selector is not None
        state = selector.state_dict() if with_state else {}
        quantiles = self._quantiles if self._spec.shards is not None else column_quantiles(selector.table)
        return EpochSnapshot(state, select_s, selector.num_nonfinite, selector.nonfinite_ids, quantiles)

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores, `last_visit` and `times_pruned`, name → (N,)."""
        selector = self._selector if self._selector is not None else self._spec.selector()
        counts = {"last_visit": selector.table.last_visit, "times_pruned": selector.table.times_pruned}
        return {**selector.scores(), **{name: np.array(column) for name, column in counts.items()}}

    def progress(self) -> tuple[int, int, int]:
        """Return (epoch, samples observed in it, samples in its plan), for a progress display."""
        if self._selector is None or self._plan is None:
            return 0, 0, 0
        return self._selector.epoch, self._pushes.num_observed, self._plan.num_rows

    def generation(self) -> int:
        """Return the newest generation that has called, 0 before any."""
        return self._generation

    def stop(self, reason: StopReason) -> None:
        """Note why the run cannot continue; restarted workers then leave at once. Later reasons are ignored."""
        self._stop_reason = self._stop_reason or reason

    def stop_reason(self) -> StopReason | None:
        """Return the first reason given to `stop`, or None."""
        return self._stop_reason

    def pause(self) -> None:
        """Ask all ranks to save and leave."""
        self._pausing = True

    def is_pausing(self) -> bool:
        """Return whether `pause` was called."""
        return self._pausing

    def pulse(self, generation: int, rank: int, world_size: int, doing: str, doing_s: float) -> None:
        """Note what a rank is doing and for how long; earlier attempts are forgotten."""
        if generation > self._pulse_generation:
            # The first pulse starts every rank's clock: a rank that hangs before its own first pulse is silent, too.
            self._pulse_generation = generation
            self._pulses = dict.fromkeys(range(world_size), (time.monotonic(), "nothing yet", 0.0))
        if generation == self._pulse_generation:
            self._pulses[rank] = (time.monotonic(), doing, doing_s)

    def pulses(self) -> dict[int, Pulse]:
        """Return each rank's last pulse."""
        now = time.monotonic()
        return {rank: Pulse(now - heard, doing, doing_s) for rank, (heard, doing, doing_s) in self._pulses.items()}
