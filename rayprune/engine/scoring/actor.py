"""The ScoreActor: the Selector of a run behind calls, with exactly-once observation.

The class itself knows nothing of Ray: with workers it runs as a Ray actor (single-threaded, restarted without limit),
without them in the training process, and both give identical selections.

What keeps observations exact (Ray acknowledges calls that a dying actor then forgets): workers log what they pushed in
the epoch; at the flush the actor names the sequence numbers that it misses; repeats are dropped by sequence number; a
generation newer than the actor's own, which is also what a restarted actor meets, takes the state back to the epoch's
start, from the newest checkpoint, before anything is folded.

The ScoreActor of a training loop that is the user's own: its state travels in the user's checkpoints.

There is no run folder. A restarted actor begins epoch 0 again, and the workers push what it misses; in a later epoch
what it held is lost, the attempt ends, and the loop goes back to its own last checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.plan import BLOCK_ROWS, LastBatch, Plan, block_rows
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.core.table import column_quantiles
from rayprune.engine.scoring.messages import (
    AttemptKey,
    Barrier,
    EpochSnapshot,
    PlanBlock,
    PlanHeader,
    PlanPass,
    Pulse,
    Push,
    RankRows,
    unpack,
)
from rayprune.engine.storage.checkpoint import checkpoint_path, is_written, load_selector_state
from rayprune.engine.storage.run_folder import write_selection
from rayprune.errors import CheckpointPending, ConfigError, ObservationsLost, StaleGeneration
from rayprune.methods import Method, build_method
from rayprune.sources import SampleSource
from rayprune.sources.base import shuffle_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreSpec:
    """What a ScoreActor is made of; small, so that a restart sends little.

    Attributes:
        method: the method's config, or the method itself where it has no name.
        source: the training source; its groups decide the shuffle.
        labelled: whether the source is asked for its labels: for methods that need them, and to tell what share of
            each class is kept.
        num_validation: rows of the validation split, 0 without one.
        batch_size: global batch.
        row_bytes: bytes of one training row in the stream.
        run_folder: where checkpoints are read and selections written; None writes nothing.
        keep_selections: how many epochs' selections stay on disk.
        chosen: what a method with a file trains on.
        record: signals whose mean over the visits is kept beside the method's own scores.
        visits_collected: samples trained by a run that scored them before.
        meta_every: what the train step asks for of the unpruned stream, as `Plan.of_selection` takes it.
        task_rows: of a read task of the stream, at most.
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
    labelled: bool = False
    chosen: Selection | None = None
    record: tuple[str, ...] = ()
    visits_collected: int = 0
    meta_every: int = 0
    task_rows: int = BLOCK_ROWS

    def selector(self) -> Selector:
        """Return a fresh Selector."""
        labels = self.source.labels if self.labelled else None
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
    """Gather observations from all ranks, emit each epoch's plan."""

    def __init__(self, spec: ScoreSpec) -> None:
        self._spec = spec
        self._generation = 0
        self._selector: Selector | None = None
        self._received: dict[int, set[int]] = {}
        self._pass: PlanPass | None = None
        self._plan: Plan | None = None
        self._num_observed = 0
        self._barrier: Barrier | None = None
        self._arrived: set[int] = set()
        self._passed: tuple[AttemptKey, Barrier] | None = None
        self._stopped: tuple[str, bool] | None = None
        self._pausing = False
        self._pulses: dict[int, tuple[float, str, float]] = {}
        self._pulse_generation = 0

    def _enter(self, key: AttemptKey) -> Selector:
        """Let a call in; the first one of a newer attempt takes the state back to where the attempt began."""
        if key.generation < self._generation:
            raise StaleGeneration(f"generation {key.generation} was replaced by {self._generation}")
        if key.generation > self._generation or self._selector is None:
            self._selector, self._generation = self._state_before(key.epoch, key.resume_step), key.generation
            self._start_epoch()
        if key.epoch != self._selector.epoch:
            raise StaleGeneration(f"a call of epoch {key.epoch} in epoch {self._selector.epoch}")
        return self._selector

    def _state_before(self, epoch: int, step: int) -> Selector:
        """Return a Selector as it was before a step, from the checkpoint; a fresh one at the run's start."""
        selector = self._spec.selector()
        if (epoch, step) > (0, 0):
            assert self._spec.run_folder is not None
            folder = Path(self._spec.run_folder)
            if not is_written(checkpoint_path(folder, epoch, step)):
                raise CheckpointPending(f"the checkpoint before step {step} of epoch {epoch} is not written yet")
            selector.load_state_dict(load_selector_state(folder, epoch, step))
        selector.begin_epoch(epoch)
        return selector

    def _start_epoch(self) -> None:
        self._received, self._pass, self._plan, self._num_observed = {}, None, None, 0
        self._barrier = None

    def announce(self, plan_pass: PlanPass) -> PlanHeader:
        """Lay out the plan of a pass; every rank announces the same pass, the first one makes the plan."""
        selector = self._enter(plan_pass.key)
        start = time.perf_counter()
        if plan_pass != self._pass or self._plan is None:
            self._plan = self._make_plan(selector, plan_pass)
            self._pass = plan_pass
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
        """Return a rank's rows of the steps [start_step, stop_step) of a pass's plan."""
        if plan_pass != self._pass:  # a restarted actor lays the same plan out again
            self.announce(plan_pass)
        assert self._plan is not None
        return self._plan.rank_rows(rank, plan_pass.world_size, start_step, stop_step)

    def blocks(self) -> tuple[str, list[PlanBlock]]:
        """Return the running pass's phase and its blocks for the stream; no blocks before the first pass."""
        if self._pass is None or self._plan is None:
            return "train", []
        running, plan = self._pass, self._plan
        cut = plan.blocks(running.world_size, self._spec.row_bytes, running.start_step, self._spec.task_rows)
        rows = [plan.rank_rows(b.rank, running.world_size, b.start_step, b.stop_step)[:2] for b in cut]
        return running.phase, rows

    def observe(self, key: AttemptKey, push: Push) -> None:
        """Fold one push; a sequence number that has been seen in this epoch is dropped."""
        try:
            selector = self._enter(key)
        except (StaleGeneration, CheckpointPending) as error:  # at the flush what is missing is pushed again
            logger.info("a push was refused: %s", error)
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
        """Note that a rank has come to a barrier, once its pushes are in.

        Args:
            key: the running epoch.
            barrier: where the rank is.
            rank: who.
            num_pushes: how many pushes it has made in this epoch.

        Returns:
            The numbers of its pushes that have not arrived: push them again and come again.

        Raises:
            ValueError: other ranks are at another barrier.
        """
        self._enter(key)
        if missing := set(range(num_pushes)) - self._received.get(rank, set()):
            return sorted(missing)
        if barrier != self._barrier:
            if self._barrier is not None:
                raise ConfigError(
                    f"rank {rank} is at {_where(barrier)}, other ranks are at {_where(self._barrier)}: every rank must "
                    "take the same batches and call state_dict() at the same step"
                )
            self._barrier, self._arrived = barrier, set()
        self._arrived.add(rank)
        return []

    def absent_ranks(self, key: AttemptKey, barrier: Barrier) -> list[int]:
        """Return the ranks that have not come to a barrier."""
        self._enter(key)
        return sorted(set(range(barrier.world_size)) - (self._arrived if barrier == self._barrier else set()))

    def pass_barrier(self, key: AttemptKey, barrier: Barrier, with_state: bool = True) -> EpochSnapshot | None:
        """Return the state once all ranks have come to a barrier; at an epoch's end, select the next one's samples.

        Rank 0 calls it and lets the others go on, so that nothing changes before it has the state.

        Returns:
            What belongs into a checkpoint; None while ranks are absent (all are after a restart of the actor).
        """
        if (key, barrier) == self._passed:
            return self._snapshot(0.0, with_state)  # asked again after an answer that got lost
        if self.absent_ranks(key, barrier):
            return None
        select_s = self._close_epoch(key.epoch) if barrier.moment == "close" else 0.0
        self._barrier, self._passed = None, (key, barrier)
        return self._snapshot(select_s, with_state)

    def _close_epoch(self, epoch: int) -> float:
        """Store the epoch's selection and make the next one; return the seconds that took."""
        assert self._selector is not None
        if self._spec.run_folder is not None:
            folder = Path(self._spec.run_folder)
            write_selection(folder, epoch, self._selector.begin_epoch(epoch), self._spec.keep_selections)
        start = time.perf_counter()
        if epoch + 1 < self._spec.num_epochs:
            self._selector.begin_epoch(epoch + 1)
            self._start_epoch()
        return time.perf_counter() - start

    def _snapshot(self, select_s: float, with_state: bool) -> EpochSnapshot:
        selector = self._selector
        assert selector is not None
        state = selector.state_dict() if with_state else {}
        quantiles = column_quantiles(selector.table)
        return EpochSnapshot(state, select_s, selector.num_nonfinite, selector.nonfinite_ids, quantiles)

    def progress(self) -> tuple[int, int, int]:
        """Return (epoch, samples observed in it, samples its plan holds), for a progress display."""
        if self._selector is None or self._plan is None:
            return 0, 0, 0
        return self._selector.epoch, self._num_observed, self._plan.num_rows

    def stop(self, reason: str, failed: bool) -> None:
        """Remember why the run cannot go on, so that a restarted worker group leaves at once."""
        self._stopped = self._stopped or (reason, failed)

    def stopped(self) -> tuple[str, bool] | None:
        """Return what was given to `stop` first, or None."""
        return self._stopped

    def generation(self) -> int:
        """Return the newest generation that has called; 0 before any."""
        return self._generation

    def pause(self) -> None:
        """Ask all ranks to save and leave."""
        self._pausing = True

    def pausing(self) -> bool:
        """Return whether `pause` was called."""
        return self._pausing

    def pulse(self, generation: int, rank: int, world_size: int, doing: str, doing_s: float) -> None:
        """Note what a rank is doing; ranks of an older generation are forgotten."""
        if generation > self._pulse_generation:
            # The first rank to be heard vouches for the others: one that hangs before its first pulse is silent too.
            self._pulse_generation = generation
            self._pulses = dict.fromkeys(range(world_size), (time.monotonic(), "nothing yet", 0.0))
        if generation == self._pulse_generation:
            self._pulses[rank] = (time.monotonic(), doing, doing_s)

    def pulses(self) -> dict[int, Pulse]:
        """Return each rank's last pulse."""
        now = time.monotonic()
        return {rank: Pulse(now - heard, doing, doing_s) for rank, (heard, doing, doing_s) in self._pulses.items()}


def _where(barrier: Barrier) -> str:
    """Say where a barrier is."""
    return f"step {barrier.step}" + (", the epoch's end" if barrier.moment == "close" else "")


# What a filtered stream keeps: a key, codes (N,) (0 = left out), the weight of each code from 1 on.
Wanted = tuple[tuple[Any, ...], NDArray[np.uint8], NDArray[np.float32]]


@dataclass(frozen=True)
class LoopSettings:
    """What every rank must know of a pruned data set.

    Attributes:
        signals: what the method needs to see of a sample in training.
        sweep_signals: the same in a forward-only pass.
        about: what a state must share to be loaded: fingerprint, samples, batch size, epochs, seed.
    """

    signals: tuple[str, ...]
    sweep_signals: tuple[str, ...]
    num_epochs: int
    batch_size: int
    about: dict[str, Any]


class LoopActor(ScoreActor):
    """A ScoreActor that takes its state from the user's checkpoints."""

    def terms(self) -> LoopSettings:
        """Return what the ranks must know."""
        spec = self._spec
        about = {
            "fingerprint": spec.source.fingerprint,
            "num_samples": len(spec.source),
            "shuffle": shuffle_name(spec.source),
            "num_epochs": spec.num_epochs,
            "batch_size": spec.batch_size,
            "last_batch": spec.last_batch,
            "seed": spec.seed,
        }
        method = build_method(spec.method)
        signals, swept = method.signals, method.sweep_signals or method.signals
        return LoopSettings(signals, swept, spec.num_epochs, spec.batch_size, about)

    def restore(self, generation: int, epoch: int, state: Mapping[str, NDArray[Any]] | None) -> None:
        """Begin `generation` at `epoch`, with the state that a checkpoint holds, or anew at epoch 0.

        Raises:
            ValueError: the state is of another method or data set.
        """
        selector = self._spec.selector()
        if state is not None:
            selector.load_state_dict({name: np.array(array) for name, array in state.items()})
        selector.begin_epoch(epoch)
        self._selector, self._generation, self._passed = selector, generation, None
        self._start_epoch()

    def _state_before(self, epoch: int, step: int) -> Selector:
        if (epoch, step) > (0, 0):
            raise ObservationsLost(
                "the ScoreActor was lost with its scores: the loop goes back to its last checkpoint "
                "(save shard.state_dict(), and give FailureConfig(max_failures=…))"
            )
        return super()._state_before(epoch, step)

    def wanted(self, known: tuple[Any, ...] | None) -> Wanted | None:
        """Return what the running pass asks for, for streams that are filtered.

        Args:
            known: the key of what the asker has; where it is still that, the answer is None.

        Returns:
            A key, codes (N,) uint8 (0 = not wanted), and the weight of each code from 1 on.
        """
        # Before the first pass Ray Data may look at a data set's schema: it sees all of it.
        if self._pass is None or self._selector is None:
            return (0,), np.ones(len(self._spec.source), dtype=np.uint8), np.ones(1, dtype=np.float32)
        epoch, phase = self._pass.key.epoch, self._pass.phase
        key = (self._generation, epoch, phase)
        if key == known:
            return None
        selection = self._selector.begin_epoch(epoch)
        if phase == "train":
            return key, selection.codes, selection.weight_values
        scored = selection.scored_ids
        codes = np.zeros(selection.num_samples, dtype=np.uint8)
        codes[slice(None) if scored is None else scored] = 1
        return key, codes, np.ones(1, dtype=np.float32)

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores and what the table counts, name → (N,)."""
        selector = self._selector if self._selector is not None else self._spec.selector()
        counted = {"last_visit": selector.table.last_visit, "times_pruned": selector.table.times_pruned}
        return {**selector.scores(), **{name: np.array(column) for name, column in counted.items()}}
