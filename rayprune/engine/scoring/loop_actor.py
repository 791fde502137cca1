"""The ScoreActor of a training loop of the user's own, whose checkpoints carry the state.

A restarted actor starts epoch 0 again, and the workers repeat what it misses. In a later epoch its scores are lost, the
attempt ends, and the loop resumes from its own last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.audit.visits import SIGNALS as AUDITED
from rayprune.core.audit.visits import TrainingVisits
from rayprune.core.selector import Selector
from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.messages import AttemptKey, EpochSnapshot, Phase, PlanBlock, Push, unpack
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.run_folder import write_scores
from rayprune.errors import ObservationsLost
from rayprune.methods import build_method
from rayprune.sources.base import shuffle_name

_AUDIT = "audit/"  # before the names of an audit's arrays in a state

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
        num_observed = self._pushes.num_observed
        super().observe(key, push)
        if self._pushes.num_observed == num_observed or push.sweep:
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
