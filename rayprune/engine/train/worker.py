"""The training loop of one worker: plan, train, forward-only pass, validate, barrier, checkpoint; epoch by epoch.

It runs in Ray Train's workers and, with num_workers 0, in Ray Train's local mode, and does not know which.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor

from rayprune.config.schema import RunSection
from rayprune.core.plan import is_meta, num_meta_batches, train_step_of
from rayprune.core.references import refusing_exit
from rayprune.engine import local_ray
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.device import DeviceBatch, DevicePlacer
from rayprune.engine.data.transport import Transport
from rayprune.engine.monitoring import FIRST_BATCH, PulseSender
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import EpochSnapshot, Moment, Phase, PlanHeader, StopReason
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.checkpoint_writer import CheckpointWriter, StateCopy
from rayprune.engine.storage.run_folder import write_validation
from rayprune.engine.train.build import WorkerSpec, build_network, build_step, pick_device, rate_at
from rayprune.engine.train.metrics import (
    BYTES,
    PADDED,
    REAL,
    SCORED,
    TRAINED,
    CorrectRows,
    MetricSums,
    compute,
    means,
    validated,
)
from rayprune.errors import TrainingPaused, TrainingStopped
from rayprune.nn.augment import channels_first, seed_generators, step_seed
from rayprune.nn.steps import BatchPlace
from rayprune.paths import as_path

_SECONDS = ("epoch", "train", "data_wait", "select", "record", "forward_only", "validate", "checkpoint")
# Mistakes in a program: restarted workers would meet them again.
_PROGRAM_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)

Verdict = Literal["continue", "save", "leave"]
_VERDICTS: tuple[Verdict, ...] = ("continue", "save", "leave")
_BROADCAST_S, _MAX_STRIDE = 0.5, 256


class Worker:
    """One rank of a run."""

    def __init__(self, spec: WorkerSpec, transport: Transport) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._spec, self._config, self._transport = spec, spec.config, transport
        torch.set_num_threads(spec.threads)
        self._device = pick_device(spec.use_gpu)
        self._place = DevicePlacer(spec.input.column, self._device)
        network = build_network(self._config, spec.input, self._device)
        self._saver = CheckpointWriter(
            as_path(spec.run_folder),
            self._config,
            self.rank,
            fingerprint=spec.fingerprint,
            shuffle=spec.shuffle,
            prior_cost=spec.prior_cost,
        )
        # Rank 0 decides for all: another rank might see a checkpoint that is just being written.
        start = broadcast_from_rank_zero(self._next_start() if self.rank == 0 else None)
        generation, (self._epoch, self._resume_step) = start
        self._step = build_step(
            self._config, network, spec.input, spec.step, device=self._device, world_size=self.world_size
        )
        sums: list[float] = []
        if (self._epoch, self._resume_step) > (0, 0):
            sums = self._saver.restore(self._epoch, self._resume_step, network, self._step, self._device)
        self._resumed_sums = sums if self.rank == 0 else []
        self._meta_interval = self._config.train.meta_interval
        self._network = network
        self._session = ScoringSession(spec.scores, generation, self.rank, self.world_size, spec.step.signals)
        self._trigger = CheckpointTrigger(self._session, self._config.run)
        self._pulse = PulseSender(spec.scores, generation, self.rank, self.world_size)
        self._wait = FIRST_BATCH  # what the rank does until its next batch
        self._seconds: dict[str, float] = {}

    def _next_start(self) -> tuple[int, tuple[int, int]]:
        """Return this attempt's generation and its position (epoch, step).

        The clock keeps generations rising if the actor restarts, the actor if the run moves to a slower clock.
        """
        if not (as_path(self._spec.run_folder) / "config.yaml").exists():  # the run would start from the beginning
            raise FileNotFoundError(f"the run folder {self._spec.run_folder} is gone: bring its storage back")
        generation = max(self._spec.scores.generation() + 1, time.time_ns())
        return generation, newest_position(as_path(self._spec.run_folder))

    def run(self) -> None:
        """Train the remaining epochs."""
        local_ray.unblock_sigterm_in_forks()
        scores = self._spec.scores
        if scores.stop_reason() is not None:
            return
        try:
            for epoch in range(self._epoch, self._config.last_epoch):
                with refusing_exit():
                    leaves = self._run_epoch(epoch)
                self._resume_step = 0
                if leaves:
                    break
            self._saver.report()
        except TrainingPaused:
            self._saver.wait()
        except TrainingStopped as error:
            scores.stop(StopReason(str(error), failed=False))
            if self.world_size > 1 and not error.on_all_ranks:
                raise  # the other ranks wait in a collective call; Ray ends them, and the next attempt leaves at once
        except _PROGRAM_ERRORS as error:
            cause = getattr(error, "cause", None) or error  # the actor's own error inside Ray's
            line = next(iter(str(cause).splitlines()), "no message")
            scores.stop(StopReason(f"on rank {self.rank}: {type(cause).__name__}: {line}", failed=True))
            raise
        finally:
            self._saver.close()
            self._pulse.stop()

    def _run_epoch(self, epoch: int) -> bool:
        """Train an epoch and save; return whether the run was paused and must leave now."""
        start = time.perf_counter()
        self._seconds = dict.fromkeys(_SECONDS, 0.0)
        self._session.start_epoch(epoch, self._resume_step)
        header = self._session.announce()
        self._trigger.start_epoch(train_step_of(self._resume_step, header.meta_every))
        self._seconds["select"] += header.select_s
        sums, lr = MetricSums(self._device).total(1), 0.0
        if self._spec.step.trains:
            with self._timed("train"):
                sums, lr = self._train(epoch, header)
        forwarded: Tensor | None = None
        if header.num_forward_only:
            with self._timed("forward_only"):
                self._share_buffers()
                self._session.recorder.start_sweep(self._spec.step.sweep_signals)
                forwarded = self._forward("forward", record=True)
        is_last = epoch + 1 == self._config.last_epoch
        validation: Tensor | None = None
        if self._spec.num_validation and (is_last or (epoch + 1) % self._config.train.validate_every == 0):
            with self._timed("validate"):
                self._share_buffers()
                validation = self._forward("validate", record=False, keep_rows=is_last)
        verdict = self._trigger.verdict_between_epochs()
        is_saved = verdict != "continue" or is_last or (epoch + 1) % self._config.run.checkpoint_epochs == 0
        snapshot = self._barrier("close", header.num_steps, with_state=is_saved)
        self._seconds["select"] += snapshot.select_s
        record = {
            **self._metrics(epoch, header, (sums, forwarded, validation)),
            "lr": lr,
            "world_size": self.world_size,
            "plan_hash": header.hash,
            "selection": dict(header.facts),
            "score_quantiles": dict(snapshot.score_quantiles),
        }
        self._save(epoch, record, snapshot if is_saved else None, start)
        if is_saved:
            self._trigger.note_save()
        return verdict == "leave"

    def _train(self, epoch: int, header: PlanHeader) -> tuple[Tensor, float]:
        """Train the epoch's batches; return the sums over all ranks and the last learning rate."""
        if header.num_steps == 0:
            raise TrainingStopped(
                f"epoch {epoch} keeps {header.num_kept} samples, less than train.batch_size "
                f"{self._config.train.batch_size}, and train.last_batch is drop: use train.last_batch=pad"
            )
        seed, batch_size, lr = self._config.train.seed, self._config.train.batch_size, 0.0
        sums = MetricSums(self._device, stored=self._resumed_sums if self._resume_step else ())
        for item in with_meta_batches(self._batches(header), self._resume_step, header.meta_every):
            step, batch, meta = item.step, item.batch, item.meta
            if item.plan_step > self._resume_step:
                self._save_if_due(epoch, item.plan_step, step, sums)
            lr = rate_at(self._config, epoch, step, header.num_train_steps, header.lr_scale)
            for group in self._step.optimizer.param_groups:
                group["lr"] = lr
            seed_generators(step_seed(seed, epoch, step, self.rank), self._device)
            placed, inputs = self._augmented(batch, epoch)
            options: dict[str, Any] = {}
            if self._meta_interval:
                is_padded = step + 1 == header.num_train_steps and header.num_rows % batch_size != 0
                options = {"learns": step % self._meta_interval == 0, "is_full": not is_padded}
            if meta is not None:  # the training batches are a selection: the weights are learned from all samples
                meta_placed, meta_inputs = self._augmented(meta, epoch)
                options["meta"] = (meta_inputs, meta_placed.targets)
            if self._step.takes_place:
                steps = (epoch, step, header.num_train_steps)
                options["place"] = BatchPlace(*steps, placed.rows.ids, batch.real, header.facts)
            signals = self._step(inputs, placed.targets, placed.rows.weights, **options)
            self._record(batch, signals)
            num_bytes = batch.num_bytes + (meta.num_bytes if meta else 0)
            counts = self._step.row_counts(int(batch.real.sum()), batch.real.size)
            sums.add(signals, placed.rows, batch.real, num_bytes, counts=counts)
        return sums.total(self.world_size), lr

    def _forward(self, phase: Phase, *, record: bool, keep_rows: bool = False) -> Tensor:
        """Pass over a plan in eval mode, without augmentation; return the sums over all ranks.

        `keep_rows` writes validation.parquet before the epoch is saved, so that a finished run always has it.
        """
        header, step = self._session.announce(phase), self._spec.step
        counted = () if record else (self._spec.input.num_classes, self._step.num_exits)
        sums = MetricSums(self._device, *counted)
        rows = CorrectRows(self._spec.num_validation, self._device) if keep_rows else None
        options: dict[str, Any] = {"signals": step.sweep_signals, "part": step.sweep_part} if record else {}
        for batch in self._batches(header):
            placed = self._place(batch)
            inputs = self._spec.input.augment.evaluate(placed.inputs)
            signals = self._step.evaluate(inputs, placed.targets, smoothed=record, **options)
            if record:
                self._record(batch, signals)
            sums.add(signals, placed.rows, batch.real, batch.num_bytes, placed.targets)
            if rows is not None:
                rows.add(signals, placed.rows)
        if rows is not None:
            correct_V = rows.total(self.world_size)
            if self.rank == 0:
                write_validation(as_path(self._spec.run_folder), correct_V)
        return sums.total(self.world_size)

    def _batches(self, header: PlanHeader) -> Iterator[Batch]:
        """Yield the batches of an announced pass; waiting for them counts as `data_wait`."""
        batches = self._session.batches(header, self._transport.batches)
        while True:
            with self._timed("data_wait"):
                self._pulse.set_activity(self._wait)
                batch = next(batches, None)
            self._pulse.set_activity("in one step")
            self._wait = "waiting for the stream"
            if batch is None:
                return
            yield batch

    def _augmented(self, batch: Batch, epoch: int) -> tuple[DeviceBatch, Tensor]:
        spec, seed = self._spec.input, self._config.train.seed
        shape = channels_first(batch.columns[spec.column].shape[1:])
        placed = self._place(batch, spec.augment.draws(batch.ids, shape, seed=seed, epoch=epoch))
        return placed, spec.augment.train(placed.inputs, placed.draws)

    def _record(self, batch: Batch, signals: dict[str, Tensor]) -> None:
        recorder = self._session.recorder
        with self._timed("record"):
            recorder.record(batch.ids, batch.real, signals)
        self._check_nonfinite(recorder.num_nonfinite, recorder.nonfinite_ids, on_all_ranks=False)

    def _barrier(self, moment: Moment, step: int, *, with_state: bool = True) -> EpochSnapshot:
        """Wait for all ranks and their observations; return the snapshot, on rank 0 with its state if asked for."""
        self._pulse.set_activity("waiting for the ScoreActor or the other ranks")
        with self._timed("record"):
            snapshot = self._session.barrier(moment, step, with_state=with_state)
        self._seconds["record"] -= snapshot.select_s
        self._check_nonfinite(snapshot.num_nonfinite, snapshot.nonfinite_ids, on_all_ranks=True)
        return snapshot

    def _check_nonfinite(self, count: int, ids: list[int], *, on_all_ranks: bool) -> None:
        limit = self._config.train.max_nonfinite
        if count > limit:
            raise TrainingStopped(
                f"training stopped: {count} losses were NaN or infinite, more than train.max_nonfinite {limit}; first "
                f"sample ids {ids[:5]}: lower optim.lr, set train.clip_norm, or look at these samples",
                on_all_ranks,
            )

    def _metrics(
        self, epoch: int, header: PlanHeader, phases: tuple[Tensor, Tensor | None, Tensor | None]
    ) -> dict[str, Any]:
        """Return the epoch's counts and means, from the sums of training, forward-only pass and validation."""
        sums, forwarded, validation = phases
        loss, accuracy = means(sums)
        num_forwarded = int(forwarded[REAL]) if forwarded is not None else 0
        num_bytes = sum(int(part[BYTES]) for part in phases if part is not None)
        num_meta = num_meta_batches(header.num_train_steps, self._meta_interval) * self._config.train.batch_size
        num_skipped = int(sums[REAL] - sums[TRAINED])
        counts = self._saver.add_counts(
            samples_trained=int(sums[TRAINED]),
            samples_forwarded=num_forwarded + int(sums[SCORED]),
            samples_padded=int(sums[PADDED]),
            bytes_read=num_bytes,
            samples_meta=num_meta,
            samples_skipped=num_skipped,
        )
        return {
            "epoch": epoch,
            "requested_prune_ratio": header.requested,
            "pruned_fraction": header.realised + num_skipped / header.num_samples,
            "kept": header.num_kept,
            "mean_weight": header.mean_weight,
            "lr_scale": header.lr_scale,
            "num_samples": header.num_samples,
            **counts,
            **self._spec.prior_cost.metrics,
            "compute": compute(counts, self._spec.prior_cost, self._step, self._spec.step.sweep_part),
            "train_loss": loss,
            "train_accuracy": accuracy,
            **validated(validation, self._step.num_exits),
        }

    def _save_if_due(self, epoch: int, plan_step: int, step: int, sums: MetricSums) -> None:
        """Save before a step inside the epoch, and leave, if it is time.

        Raises:
            TrainingPaused: the run was paused, and has saved its state.
        """
        self._saver.raise_failure()
        verdict = self._trigger.verdict(step)
        if verdict == "continue":
            return
        with self._timed("checkpoint"):
            total = sums.total(self.world_size).tolist()
            snapshot = self._barrier("snapshot", plan_step)
            if self.rank == 0:
                state = self._saver.copy_state(self._network, self._step, snapshot.state)
                self._saver.save_mid_epoch(epoch, plan_step, state, total, self._resume_step)
        if verdict == "leave":
            raise TrainingPaused(f"before step {step} of epoch {epoch}")

    def _save(self, epoch: int, record: dict[str, Any], snapshot: EpochSnapshot | None, start: float) -> None:
        """Write the epoch's line, and the state if there is a snapshot."""
        self._pulse.set_activity("saving, or waiting for rank 0 to save")
        with self._timed("checkpoint"):
            self._saver.report()  # the last epoch: its files were written meanwhile
            state: StateCopy | None = None
            if self.rank == 0 and snapshot is not None:
                state = self._saver.copy_state(self._network, self._step, snapshot.state)
        self._seconds["epoch"] = time.perf_counter() - start
        self._saver.save(epoch + 1, record, self._seconds, state)

    def _share_buffers(self) -> None:
        """Give all ranks rank 0's running statistics, so that they validate the network that is saved."""
        if self.world_size > 1:
            for buffer in (*self._network.buffers(), *self._step.buffers()):
                torch.distributed.broadcast(buffer, src=0)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


class CheckpointTrigger:
    """Decides before each step whether to save or leave first; every rank gets the same verdict.

    Ranks' clocks differ and saving is collective, so rank 0 decides and broadcasts its verdict about twice a second.
    Each broadcast also sets the step of the next one. Checkpoints every so many steps need no broadcast.

    Args:
        session: the worker's session; rank 0 asks its ScoreActor whether the run is to pause.
        run: the config's section with `checkpoint_steps` and `checkpoint_minutes`.
    """

    def __init__(self, session: ScoringSession[ScoreClient], run: RunSection) -> None:
        self._session = session
        # Between the hosts: through NCCL, a rank would wait for its GPU to read the verdict.
        self._group: Any = torch.distributed.new_group(backend="gloo") if session.world_size > 1 else None
        self._every_steps, self._every_minutes = run.checkpoint_steps, run.checkpoint_minutes
        self._saved_at = self._broadcast_at = time.perf_counter()
        self._broadcast_step, self._next_broadcast = 0, 0

    def start_epoch(self, step: int) -> None:
        """Start at this attempt's resume step."""
        self._broadcast_at = time.perf_counter()
        self._broadcast_step, self._next_broadcast = step, step + 1

    def verdict(self, step: int) -> Verdict:
        """Return what to do before `step`, which is above the epoch's first."""
        verdict: Verdict = "continue"
        if step >= self._next_broadcast:
            now = time.perf_counter()
            step_s = (now - self._broadcast_at) / max(1, step - self._broadcast_step)
            stride = max(1, min(_MAX_STRIDE, int(_BROADCAST_S / max(step_s, 1e-6))))
            verdict, stride = self._from_rank_zero(self._due(now), stride)
            self._broadcast_at, self._broadcast_step, self._next_broadcast = now, step, step + stride
        if verdict == "continue" and self._every_steps and step % self._every_steps == 0:
            verdict = "save"
        if verdict != "continue":
            self.note_save()
        return verdict

    def verdict_between_epochs(self) -> Verdict:
        """Return what to do between two epochs."""
        return self._from_rank_zero(self._due(time.perf_counter()), 1)[0]

    def note_save(self) -> None:
        """Count the minutes to the next save from now."""
        self._saved_at = time.perf_counter()

    def _due(self, now: float) -> Verdict:
        if self._session.rank > 0:
            return "continue"  # replaced by rank 0's
        if self._session.client.is_pausing():
            return "leave"
        is_late = self._every_minutes is not None and now - self._saved_at > 60 * self._every_minutes
        return "save" if is_late else "continue"

    def _from_rank_zero(self, verdict: Verdict, stride: int) -> tuple[Verdict, int]:
        if self._session.world_size == 1:
            return verdict, stride
        message = torch.tensor([_VERDICTS.index(verdict), stride], dtype=torch.int64)
        torch.distributed.broadcast(message, src=0, group=self._group)
        code, stride = message.tolist()
        return _VERDICTS[code], stride


@dataclass(frozen=True)
class TrainBatch:
    """A batch to train on.

    Attributes:
        plan_step: the step of the plan at which to resume if the run stops before this batch.
        step: the number of training batches before it in the epoch.
        batch: the batch.
        meta: the meta batch that precedes it, for steps that learn sample weights.
    """

    plan_step: int
    step: int
    batch: Batch
    meta: Batch | None = None


def with_meta_batches(batches: Iterable[Batch], start_step: int, meta_every: int) -> Iterator[TrainBatch]:
    """Yield the training batches, each with the meta batch before it.

    Nothing is trained between the two: a run that stops there resumes before the meta batch.

    Args:
        batches: consecutive batches of a plan.
        start_step: the plan's step of the first batch.
        meta_every: the plan's training batches per meta batch.
    """
    meta: Batch | None = None
    for plan_step, batch in enumerate(batches, start=start_step):
        if is_meta(plan_step, meta_every):
            meta = batch
            continue
        resume_step = plan_step if meta is None else plan_step - 1
        yield TrainBatch(resume_step, train_step_of(plan_step, meta_every), batch, meta)
        meta = None
