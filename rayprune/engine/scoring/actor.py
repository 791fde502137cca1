"""The ScoreActor: a run's Selector behind calls, with exactly-once observations.

`ScoreActor` knows nothing of Ray. With workers it runs as a Ray actor (single-threaded, restarted without limit),
without them as an object of the training process; both give identical selections.

Ray acknowledges calls that a dying actor then loses, so observations are made exact here. Workers log what they push in
an epoch. At a barrier the actor names the pushes it misses and drops those it has seen. The first call of a newer
attempt, or the first call after a restart, restores the state at the attempt's resume step from the checkpoint.

`LoopActor` serves a training loop of the user's own, whose checkpoints carry the state; there is no run folder. A
restarted actor starts epoch 0 again, and the workers repeat what it misses. In a later epoch its scores are lost, the
attempt ends, and the loop resumes from its own last checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.audit.visits import SIGNALS as AUDITED
from rayprune.core.audit.visits import TrainingVisits
from rayprune.core.plan import BLOCK_ROWS, LastBatch, Plan, block_rows
from rayprune.core.references import UserCode
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
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
    StopReason,
    unpack,
)
from rayprune.engine.storage.checkpoint import checkpoint_path, is_written, restore_selector
from rayprune.engine.storage.loop_run import LoopRun
from rayprune.engine.storage.run_folder import write_scores, write_selection
from rayprune.errors import CheckpointPending, ObservationsLost, StaleGeneration, UsageError
from rayprune.methods import Method, build_method
from rayprune.paths import as_path
from rayprune.sources import SampleSource
from rayprune.sources.base import shuffle_name

logger = logging.getLogger(__name__)

_AUDIT = "audit/"  # before the names of an audit's arrays in a state


@dataclass(frozen=True)
class ScoreSpec:
    """Everything a ScoreActor is built from; small, because each restart sends it again.

    Attributes:
        method: the method's config, or the method itself if it is not registered.
        source: the training source; its groups decide the shuffle.
        num_validation: rows of the validation split, 0 without one.
        num_epochs, seed: the run's.
        batch_size: rows of a global batch.
        last_batch: whether the last batch is padded or dropped.
        row_bytes: bytes of one decoded training row.
        run_folder: where checkpoints are read and selections written; None for no folder.
        keep_selections: how many epochs' selections stay on disk.
        labeled: whether to read the labels, for methods that need them and for the fraction kept of each class.
        chosen: the selection of a method that reads one from a file.
        record: signals whose mean over the visits is kept beside the method's scores.
        visits_collected: samples that an earlier scoring run trained on.
        meta_every: training batches per meta batch, as in `Plan.of_selection`.
        task_rows: the largest number of rows in a read task of the stream.
        loop_run: the run folder of a user's loop.
        audits: whether a user's loop keeps what an audit needs of its training visits.
        checkpoint_epochs: epochs between the checkpoints at their ends.
        user_code: the user's modules, for an actor on another machine.
    """

    method: dict[str, Any] | Method
    source: SampleSource
    num_validation: int
    num_epochs: int
    seed: int
    batch_size: int
    last_batch: LastBatch
    row_bytes: int
    run_folder: str | None
    keep_selections: int
    labeled: bool = False
    chosen: Selection | None = None
    record: tuple[str, ...] = ()
    visits_collected: int = 0
    meta_every: int = 0
    task_rows: int = BLOCK_ROWS
    loop_run: LoopRun | None = None
    audits: bool = False
    checkpoint_epochs: int = 1
    user_code: UserCode = field(default_factory=UserCode, compare=False)

    def selector(self) -> Selector:
        """Build a fresh Selector."""
        labels = self.source.labels if self.labeled else None
        run = (len(self.source), self.num_epochs, self.seed)
        return Selector(
            build_method(self.method),
            *run,
            labels,
            chosen=self.chosen,
            record=self.record,
            visits_collected=self.visits_collected,
        )


class ScoreActor:
    """Aggregate the observations of all ranks and plan every epoch."""

    def __init__(self, spec: ScoreSpec) -> None:
        self._spec = spec
        self._generation = 0
        self._selector: Selector | None = None
        # The current epoch: pushes received by rank, the announced pass and its plan, who is at which barrier.
        self._received: dict[int, set[int]] = {}
        self._num_observed = 0
        self._pass: PlanPass | None = None
        self._was_announced = False
        self._plan: Plan | None = None
        self._barrier: Barrier | None = None
        self._arrived: set[int] = set()
        self._passed: tuple[AttemptKey, Barrier] | None = None
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
            self._selector, self._generation = self._state_before(key.epoch, key.resume_step), key.generation
            self._start_epoch()
        if key.epoch != self._selector.epoch:
            raise StaleGeneration(f"a call of epoch {key.epoch} came in epoch {self._selector.epoch}")
        return self._selector

    def _state_before(self, epoch: int, step: int) -> Selector:
        """Return the Selector as it was before a step, from its checkpoint; a fresh one at the start of the run."""
        selector = self._spec.selector()
        if (epoch, step) > (0, 0):
            assert self._spec.run_folder is not None
            folder = as_path(self._spec.run_folder)
            checkpoint = checkpoint_path(folder, epoch, step)
            if not is_written(checkpoint):
                if step == 0 and epoch % self._spec.checkpoint_epochs:
                    raise ObservationsLost(
                        f"the ScoreActor has died, and the scores before epoch {epoch + 1} are in no checkpoint "
                        f"(run.checkpoint_epochs = {self._spec.checkpoint_epochs}): the run goes on from its last one"
                    )
                raise CheckpointPending(f"the checkpoint before step {step} of epoch {epoch} is not written yet")
            restore_selector(selector, checkpoint)
        selector.begin_epoch(epoch)
        return selector

    def _start_epoch(self) -> None:
        self._received, self._num_observed = {}, 0
        self._pass = self._plan = self._barrier = None

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
        received = self._received.setdefault(push.rank, set())
        if push.sequence in received:
            return
        signals = unpack(push.layout, push.buffer)
        ids = signals.pop("id")
        selector.observe(ids, signals, key.epoch, sweep=push.sweep)
        received.add(push.sequence)
        self._num_observed += ids.size

    def arrive(self, key: AttemptKey, barrier: Barrier, rank: int, num_pushes: int) -> list[int]:
        """Register a rank at a barrier once all its pushes have arrived.

        Args:
            key: the attempt and the epoch.
            barrier: the barrier that the rank has reached.
            rank: the rank.
            num_pushes: pushes the rank has made in this epoch.

        Returns:
            The numbers of its lost pushes, to be repeated before the next call; empty if the rank is registered.

        Raises:
            UsageError: another rank is at another barrier.
        """
        if (key, barrier) == self._passed:
            return []  # a repeated call whose answer was lost
        self._enter(key)
        if lost := set(range(num_pushes)) - self._received.get(rank, set()):
            return sorted(lost)
        if barrier != self._barrier:
            if self._barrier is not None:
                raise UsageError(
                    f"rank {rank} is at {barrier}, another rank is at {self._barrier}: every rank must take the same "
                    "batches and call state_dict() at the same step"
                )
            self._barrier, self._arrived = barrier, set()
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
            The snapshot, or None while ranks are absent.
        """
        if (key, barrier) == self._passed:
            return self._snapshot(0.0, with_state)  # a repeated call whose answer was lost
        if self.absent_ranks(key, barrier):
            return None
        select_s = self._close_epoch(key.epoch) if barrier.moment == "close" else 0.0
        self._barrier, self._passed = None, (key, barrier)
        return self._snapshot(select_s, with_state)

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
            self._start_epoch()
        return time.perf_counter() - start

    def _snapshot(self, select_s: float, with_state: bool) -> EpochSnapshot:
        selector = self._selector
        assert selector is not None
        state = selector.state_dict() if with_state else {}
        quantiles = column_quantiles(selector.table)
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
        return self._selector.epoch, self._num_observed, self._plan.num_rows

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


# The rows that a filtered stream keeps: key of the pass, codes (N,) uint8 (0 to drop), weight of each code from 1 on.
WantedRows = tuple[tuple[Any, ...], NDArray[np.uint8], NDArray[np.float32]]


@dataclass(frozen=True)
class LoopSettings:
    """The settings of a pruned dataset that every rank needs.

    Attributes:
        signals: signals that the method needs of a training visit.
        sweep_signals: signals that it needs of a forward-only visit.
        num_epochs: epochs of the whole run.
        batch_size: rows of a global batch.
        identity: what a saved state must agree with: fingerprint, number of samples, batch size, epochs, seed, shuffle.
        has_run: whether the loop has a run folder.
        audits: whether every visit is recorded for an audit.
    """

    signals: tuple[str, ...]
    sweep_signals: tuple[str, ...]
    num_epochs: int
    batch_size: int
    identity: dict[str, Any]
    has_run: bool = False
    audits: bool = False


@dataclass(frozen=True, eq=False)
class AuditRecord:
    """What a loop has recorded for an audit.

    Attributes:
        visits: the training visits.
        labels: (N,) the labels of the data.
        class_names: as in the data's schema.
        fingerprint: of the data.
        seed: the loop's.
        run_folder: the loop's, or None.
    """

    visits: TrainingVisits
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    fingerprint: str
    seed: int
    run_folder: Path | None


class LoopActor(ScoreActor):
    """The ScoreActor of a user's own loop; its state comes from the user's checkpoints."""

    def __init__(self, spec: ScoreSpec) -> None:
        super().__init__(spec)
        # Sum and number of the epoch's losses, and the mean of the last closed epoch.
        self._loss_sum, self._num_losses = 0.0, 0
        self._closed_loss: float | None = None
        self._visits = self._fresh_visits()

    def _fresh_visits(self) -> TrainingVisits | None:
        return TrainingVisits(len(self._spec.source), self._spec.num_epochs) if self._spec.audits else None

    def settings(self) -> LoopSettings:
        """Return the settings that every rank needs."""
        spec = self._spec
        identity = {
            "fingerprint": spec.source.fingerprint,
            "num_samples": len(spec.source),
            "shuffle": shuffle_name(spec.source),
            "num_epochs": spec.num_epochs,
            "batch_size": spec.batch_size,
            "last_batch": spec.last_batch,
            "seed": spec.seed,
        }
        if spec.audits:
            identity["audit"] = True
        method = build_method(spec.method)
        signals = tuple(dict.fromkeys((*method.signals, *spec.record, *(AUDITED if spec.audits else ()))))
        sweep_signals = method.sweep_signals or method.signals
        has_run = spec.loop_run is not None
        return LoopSettings(signals, sweep_signals, spec.num_epochs, spec.batch_size, identity, has_run, spec.audits)

    def restore(self, generation: int, epoch: int, state: Mapping[str, NDArray[Any]] | None) -> None:
        """Start an attempt at an epoch, with the state of a checkpoint, or afresh without one.

        Raises:
            RunFolderError: the state is another method's or dataset's.
        """
        selector, visits = self._spec.selector(), self._fresh_visits()
        if state is not None:
            selector.load_state_dict({name: np.array(array) for name, array in state.items()})
            if visits is not None:
                own = {name: np.array(array) for name, array in state.items() if name.startswith(_AUDIT)}
                visits.load_state_dict({name.removeprefix(_AUDIT): array for name, array in own.items()})
        selector.begin_epoch(epoch)
        self._selector, self._visits, self._generation, self._passed = selector, visits, generation, None
        self._start_epoch()
        if self._spec.loop_run is not None and epoch < self._spec.num_epochs:
            self._spec.loop_run.open(epoch, resumed=state is not None)

    def blocks(self) -> tuple[Phase | None, list[PlanBlock]]:
        """As for ScoreActor, but (None, []) before the first pass, which a loop that forgot its Shard never makes."""
        return super().blocks() if self._was_announced else (None, [])

    def log_epoch(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Append the last closed epoch's line to the run folder; after the last epoch, write the scores there.

        Returns:
            The line with its train_loss, to be sent again with further metrics.
        """
        spec, selector = self._spec, self._selector
        assert spec.loop_run is not None
        assert selector is not None
        line = {"train_loss": self._closed_loss, **line}
        spec.loop_run.log(line)
        if line["epoch"] + 1 == spec.num_epochs:
            labels = spec.source.labels if spec.labeled else None
            write_scores(spec.loop_run.folder, selector, labels, spec.source.fingerprint)
        return line

    def observe(self, key: AttemptKey, push: Push) -> None:
        """Fold one push into the table, once, and add up its losses."""
        num_observed = self._num_observed
        super().observe(key, push)
        if self._num_observed == num_observed or push.sweep:
            return
        signals = unpack(push.layout, push.buffer)
        if self._visits is not None:
            self._visits.observe(signals["id"], signals, key.epoch)
        losses = signals.get("loss")
        if losses is not None:
            finite = losses[np.isfinite(losses)]
            self._loss_sum += float(finite.sum(dtype=np.float64))
            self._num_losses += finite.size

    def audit_record(self) -> AuditRecord | None:
        """Return what was recorded for an audit; None if nothing is."""
        spec, run = self._spec, self._spec.loop_run
        if self._visits is None:
            return None
        facts = (spec.source.schema.class_names, spec.source.fingerprint, spec.seed)
        return AuditRecord(self._visits, spec.source.labels, *facts, None if run is None else run.folder)

    def _snapshot(self, select_s: float, with_state: bool) -> EpochSnapshot:
        snapshot = super()._snapshot(select_s, with_state)
        if self._visits is None or not with_state:
            return snapshot
        visits = {f"{_AUDIT}{name}": array for name, array in self._visits.state_dict().items()}
        return replace(snapshot, state={**snapshot.state, **visits})

    def _start_epoch(self) -> None:
        super()._start_epoch()
        self._loss_sum, self._num_losses = 0.0, 0

    def _close_epoch(self, epoch: int) -> float:
        self._closed_loss = self._loss_sum / self._num_losses if self._num_losses else None
        return super()._close_epoch(epoch)

    def _state_before(self, epoch: int, step: int) -> Selector:
        if (epoch, step) > (0, 0):
            raise ObservationsLost(
                "the ScoreActor was lost with its scores: restart the loop from its last checkpoint (save "
                "shard.state_dict(), and set FailureConfig(max_failures=…))"
            )
        self._visits = self._fresh_visits()
        return super()._state_before(epoch, step)

    def wanted_rows(self, known: tuple[Any, ...] | None) -> WantedRows | None:
        """Return the rows of the current pass, for filtered streams.

        Args:
            known: the key of the rows that the caller has.

        Returns:
            The rows, or None if the caller has them already; the key is () before the first pass. Ray Data gives every
            rank the same number and drops the rest of the stream, up to W−1 rows, so other rows are left out in each
            epoch.
        """
        if self._pass is None or self._selector is None:
            return (
                (0,) if self._was_announced else (),
                np.ones(len(self._spec.source), dtype=np.uint8),
                np.ones(1, dtype=np.float32),
            )
        epoch, phase = self._pass.key.epoch, self._pass.phase
        key = (self._generation, epoch, phase)
        if key == known:
            return None
        selection = self._selector.begin_epoch(epoch)
        if phase == "train":
            codes, weights = selection.codes.copy(), selection.weight_values
        else:
            codes, weights = np.zeros(selection.num_samples, dtype=np.uint8), np.ones(1, dtype=np.float32)
            codes[slice(None) if selection.scored_ids is None else selection.scored_ids] = 1
        wanted = np.flatnonzero(codes)
        rng = np.random.default_rng([self._spec.seed, epoch, 0, 3])
        codes[rng.choice(wanted, wanted.size % self._pass.world_size, replace=False)] = 0
        return key, codes, weights
