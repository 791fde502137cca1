"""The training loop of one worker: epochs of plan → train → forward-only → flush → validate → checkpoint.

Runs in Ray Train workers and, with num_workers 0, in Ray Train's local mode; nothing here knows which.

When all ranks save inside an epoch, and when they leave.

Ranks' clocks differ and saving is collective, so rank 0 decides and tells the others, about twice a second: each
message also names the step of the next one. A count of steps needs no message.

What a step that learns weights is given in an epoch that prunes: each batch, and the meta batch that precedes it.

Nothing is trained between the two: a run that stops there goes on before the meta batch.

What ends a run for good, each with the line that says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch import Tensor

from rayprune.config import Config
from rayprune.config.schema import RunSection
from rayprune.core.plan import is_meta, num_meta_batches, train_step_of
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.device import DeviceBatch, DevicePlacer
from rayprune.engine.data.transport import Transport
from rayprune.engine.monitoring import Pulsing
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import EpochSnapshot, Moment, Phase, PlanHeader
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.checkpoint_writer import CheckpointWriter
from rayprune.engine.train.build import WorkerSpec, build_network, build_step, pick_device, rate_at
from rayprune.engine.train.metrics import BYTES, PADDED, REAL, MetricSums, compute, means, validated
from rayprune.errors import TrainingPaused, TrainingStopped
from rayprune.nn.augment import seed_generators, step_seed

Verdict = Literal["go on", "save", "leave"]
_VERDICTS: tuple[Verdict, ...] = ("go on", "save", "leave")

_TALK_S = 0.5
_MOST_STEPS = 256


class CheckpointTrigger:
    """Decide before each step whether to save or leave first; every rank comes to the same verdict.

    Args:
        scores: asked by rank 0 whether the run is to pause.
        rank, world_size, device: this worker, and where its collective tensors live.
        run: the config's section with checkpoint_steps and checkpoint_minutes.
    """

    def __init__(self, scores: ScoreClient, rank: int, world_size: int, device: torch.device, run: RunSection) -> None:
        self._scores, self._rank, self._world_size, self._device = scores, rank, world_size, device
        self._every_steps, self._every_minutes = run.checkpoint_steps, run.checkpoint_minutes
        self._saved_at = self._talked_at = time.perf_counter()
        self._next_talk, self._talked_step = 0, 0

    def start_epoch(self, step: int) -> None:
        """Begin counting at the step that this attempt has of the epoch; it was saved just now."""
        self._saved_at = self._talked_at = time.perf_counter()
        self._next_talk, self._talked_step = step + 1, step

    def verdict(self, step: int) -> Verdict:
        """Return what to do before `step` (above the epoch's first)."""
        verdict: Verdict = "go on"
        if step >= self._next_talk:
            now = time.perf_counter()
            pace = (now - self._talked_at) / max(1, step - self._talked_step)
            stride = max(1, min(_MOST_STEPS, int(_TALK_S / max(pace, 1e-6))))
            verdict, stride = self._from_rank_zero(self._due(now), stride)
            self._talked_at, self._talked_step, self._next_talk = now, step, step + stride
        if verdict == "go on" and self._every_steps and step % self._every_steps == 0:
            verdict = "save"
        if verdict != "go on":
            self._saved_at = time.perf_counter()
        return verdict

    def leave_now(self) -> bool:
        """Return whether to leave between epochs."""
        return self._from_rank_zero(self._due(time.perf_counter()), 1)[0] == "leave"

    def _due(self, now: float) -> Verdict:
        if self._rank > 0:
            return "go on"  # overwritten by rank 0's
        if self._scores.pausing():
            return "leave"
        late = self._every_minutes is not None and now - self._saved_at > 60 * self._every_minutes
        return "save" if late else "go on"

    def _from_rank_zero(self, verdict: Verdict, stride: int) -> tuple[Verdict, int]:
        if self._world_size == 1:
            return verdict, stride
        said = torch.tensor([_VERDICTS.index(verdict), stride], dtype=torch.int64, device=self._device)
        torch.distributed.broadcast(said, src=0)
        code, stride = said.tolist()
        return _VERDICTS[code], stride


@dataclass(frozen=True)
class TrainBatch:
    """A batch to be trained.

    Attributes:
        place: the step of the plan to go on from, should the run stop before this batch.
        step: batches trained before it in the epoch.
        batch: the batch.
        meta: rows of the unpruned stream that came with it.
    """

    place: int
    step: int
    batch: Batch
    meta: Batch | None = None


def with_meta_batches(batches: Iterable[Batch], first: int, meta_every: int) -> Iterator[TrainBatch]:
    """Yield the batches that train, each with the meta batch before it.

    Args:
        batches: of a plan, in order.
        first: the plan's step that they begin at.
        meta_every: of the plan.
    """
    meta: Batch | None = None
    for place, batch in enumerate(batches, start=first):
        if is_meta(place, meta_every):
            meta = batch
            continue
        yield TrainBatch(place if meta is None else place - 1, train_step_of(place, meta_every), batch, meta)
        meta = None


def nothing_to_train(config: Config, epoch: int, header: PlanHeader) -> TrainingStopped:
    """Return what ends a run whose selection is less than a batch, where such batches are dropped."""
    return TrainingStopped(
        f"epoch {epoch} keeps {header.num_kept} samples, less than train.batch_size {config.train.batch_size}, and "
        "train.last_batch is drop: use train.last_batch=pad"
    )


def too_many_nonfinite(config: Config, count: int, ids: list[int], on_all_ranks: bool) -> TrainingStopped:
    """Return what ends a run whose losses diverge."""
    return TrainingStopped(
        f"training stopped: {count} losses were NaN or infinite, more than train.max_nonfinite "
        f"{config.train.max_nonfinite}; first sample ids {ids[:5]}: lower optim.lr, set train.clip_norm, or "
        "look at these samples",
        on_all_ranks,
    )


logger = logging.getLogger(__name__)

_SECONDS = ("epoch", "train", "data_wait", "select", "record", "forward_only", "validate", "checkpoint")
# Mistakes in a program: Ray would restart the workers `max_failures` times to meet them again.
_WOULD_FAIL_AGAIN = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError)


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
            Path(spec.run_folder), self._config, spec.fingerprint, spec.shuffle, self.rank, spec.before
        )
        # Rank 0 decides for all: another rank might see a checkpoint that is just being written.
        start = broadcast_from_rank_zero(self._next_start() if self.rank == 0 else None)
        self._generation, (self._epoch, self._resume_step) = start
        self._step = build_step(self._config, network, spec.input, spec.terms, self.world_size, self._device)
        sums: list[float] = []
        if (self._epoch, self._resume_step) > (0, 0):
            sums = self._saver.restore(self._epoch, self._resume_step, network, self._step, self._device)
        self._resumed_sums = sums if self.rank == 0 else []
        self._meta_interval = self._config.train.meta_interval
        self._network = network
        self._session = ScoringSession(spec.scores, self._generation, self.rank, self.world_size, spec.terms.signals)
        self._pacer = CheckpointTrigger(spec.scores, self.rank, self.world_size, self._device, self._config.run)
        self._pulse = Pulsing(spec.scores, self._generation, self.rank, self.world_size)
        self._seconds: dict[str, float] = {}

    def _next_start(self) -> tuple[int, tuple[int, int]]:
        """Return this attempt's generation and position (epoch, step).

        The clock keeps generations rising past a restart of the actor, the actor past a move to a slower clock.
        """
        if not (Path(self._spec.run_folder) / "config.yaml").exists():  # without this the run would begin anew
            raise FileNotFoundError(f"the run folder {self._spec.run_folder} is gone: bring its storage back")
        generation = max(self._spec.scores.generation() + 1, time.time_ns())
        return generation, newest_position(Path(self._spec.run_folder))

    def run(self) -> None:
        """Train the epochs that are left."""
        if self._spec.scores.stopped() is not None:
            return
        try:
            for epoch in range(self._epoch, self._config.last_epoch):
                self._run_epoch(epoch)
                self._resume_step = 0
                if self._pacer.leave_now():
                    break
            self._saver.report()
        except TrainingPaused:
            self._saver.wait()
        except TrainingStopped as error:
            self._spec.scores.stop(str(error), False)
            if self.world_size > 1 and not error.on_all_ranks:
                raise  # the others wait in a collective call; Ray ends them, and the next attempt leaves at once
        except _WOULD_FAIL_AGAIN as error:
            cause = getattr(error, "cause", None) or error  # what the actor raised, out of Ray's wrapping
            line = next(iter(str(cause).splitlines()), "no message")
            self._spec.scores.stop(f"on rank {self.rank}: {type(cause).__name__}: {line}", True)
            raise
        finally:
            self._saver.close()
            self._pulse.stop()

    def _run_epoch(self, epoch: int) -> None:
        start = time.perf_counter()
        self._seconds = dict.fromkeys(_SECONDS, 0.0)
        self._session.start_epoch(epoch, self._resume_step)
        header = self._session.announce()
        self._pacer.start_epoch(train_step_of(self._resume_step, header.meta_every))
        self._seconds["select"] += header.select_s
        with self._timed("train"):
            sums, lr = self._train(epoch, header)
        forwarded: Tensor | None = None
        if header.num_forward_only:
            with self._timed("forward_only"):
                self._share_buffers()
                self._session.recorder.start_sweep(self._spec.terms.sweep_signals)
                forwarded = self._forward("forward", record=True)
        last = epoch + 1 == self._config.last_epoch
        validation: Tensor | None = None
        if self._spec.has_validation and (last or (epoch + 1) % self._config.train.validate_every == 0):
            with self._timed("validate"):
                self._share_buffers()
                validation = self._forward("validate", record=False)
        snapshot = self._barrier("close", header.num_steps)
        record = self._metrics(epoch, header, sums, forwarded, validation, lr)
        record["score_quantiles"] = dict(snapshot.score_quantiles)
        self._seconds["select"] += snapshot.select_s
        self._save(epoch, record, snapshot, start)

    def _batches(self, header: PlanHeader) -> Iterator[Batch]:
        """Yield an announced pass's batches; what training waits for them is counted as data_wait."""
        stream = self._session.batches(header, self._transport.batches)
        while True:
            with self._timed("data_wait"):
                self._pulse.doing("waits for the stream")
                batch = next(stream, None)
            self._pulse.doing("is in one step")
            if batch is None:
                return
            yield batch

    def _train(self, epoch: int, header: PlanHeader) -> tuple[Tensor, float]:
        if header.num_steps == 0:
            raise nothing_to_train(self._config, epoch, header)
        seed, lr = self._config.train.seed, 0.0
        sums = MetricSums(self._device, stored=self._resumed_sums if self._resume_step else ())
        for turned in with_meta_batches(self._batches(header), self._resume_step, header.meta_every):
            step, batch, meta = turned.step, turned.batch, turned.meta
            if turned.place > self._resume_step:
                self._save_if_due(epoch, turned.place, step, sums)
            lr = rate_at(self._config, epoch, step, header.num_train_steps, header.lr_scale)
            for group in self._step.optimizer.param_groups:
                group["lr"] = lr
            seed_generators(step_seed(seed, epoch, step, self.rank), self._device)
            on_device, inputs = self._augmented(batch, epoch)
            more: dict[str, Any] = {"learns": step % self._meta_interval == 0} if self._meta_interval else {}
            if meta is not None:  # the step's own batches are a selection: it learns from what came beside them
                beside, beside_inputs = self._augmented(meta, epoch)
                more["meta"] = (beside_inputs, beside.targets)
            signals = self._step(inputs, on_device.targets, on_device.rows.weights, **more)
            self._record(batch, signals)
            sums.add(signals, on_device.rows, batch.real, batch.num_bytes + (meta.num_bytes if meta else 0))
        return sums.total(self.world_size), lr

    def _augmented(self, batch: Batch, epoch: int) -> tuple[DeviceBatch, Tensor]:
        spec, seed = self._spec.input, self._config.train.seed
        placed = self._place(batch, spec.augment.draws(batch.ids, spec.shape, seed=seed, epoch=epoch))
        return placed, spec.augment.train(placed.inputs, placed.draws)

    def _save_if_due(self, epoch: int, place: int, step: int, sums: MetricSums) -> None:
        self._saver.look()
        verdict = self._pacer.verdict(step)
        if verdict == "go on":
            return
        with self._timed("checkpoint"):
            total = sums.total(self.world_size).tolist()
            snapshot = self._barrier("snapshot", place)
            if self.rank == 0:
                state = self._saver.copied(self._network, self._step, snapshot.state)
                self._saver.save_inside(epoch, place, state, total, self._resume_step)
        if verdict == "leave":
            raise TrainingPaused(f"before step {step} of epoch {epoch}")

    def _forward(self, phase: Phase, *, record: bool) -> Tensor:
        """Pass over a plan in eval mode without augmentation; return the sums over all ranks."""
        header, terms = self._session.announce(phase), self._spec.terms
        places = () if record else (self._spec.input.num_classes, self._step.num_exits)
        sums = MetricSums(self._device, *places)
        named: dict[str, Any] = {"signals": terms.sweep_signals, "part": terms.sweep_part} if record else {}
        for batch in self._batches(header):
            on_device = self._place(batch)
            inputs = self._spec.input.augment.evaluate(on_device.inputs)
            signals = self._step.evaluate(inputs, on_device.targets, smoothed=record, **named)
            if record:
                self._record(batch, signals)
            sums.add(signals, on_device.rows, batch.real, batch.num_bytes, on_device.targets)
        return sums.total(self.world_size)

    def _record(self, batch: Batch, signals: dict[str, Tensor]) -> None:
        recorder = self._session.recorder
        with self._timed("record"):
            recorder.record(batch.ids, batch.real, signals)
        if recorder.num_nonfinite > self._config.train.max_nonfinite:
            raise too_many_nonfinite(self._config, recorder.num_nonfinite, recorder.nonfinite_ids, False)

    def _barrier(self, moment: Moment, step: int) -> EpochSnapshot:
        """Wait for all ranks and their observations; rank 0 gets the state."""
        self._pulse.doing("waits for the ScoreActor or the other ranks")
        with self._timed("record"):
            snapshot = self._session.barrier(moment, step)
        self._seconds["record"] -= snapshot.select_s
        if snapshot.num_nonfinite > self._config.train.max_nonfinite:
            raise too_many_nonfinite(self._config, snapshot.num_nonfinite, snapshot.nonfinite_ids, True)
        return snapshot

    def _metrics(
        self,
        epoch: int,
        header: PlanHeader,
        sums: Tensor,
        forwarded: Tensor | None,
        validation: Tensor | None,
        lr: float,
    ) -> dict[str, Any]:
        """Return the epoch's line; its bytes_read are those of all phases: training, forward-only and validation."""
        loss, accuracy = means(sums)
        num_forwarded = int(forwarded[REAL]) if forwarded is not None else 0
        num_bytes = sum(int(part[BYTES]) for part in (sums, forwarded, validation) if part is not None)
        num_padded = int(sums[PADDED])
        num_meta = num_meta_batches(header.num_train_steps, self._meta_interval) * self._config.train.batch_size
        counts = self._saver.count(int(sums[REAL]), num_forwarded, num_padded, num_bytes, num_meta)
        return {
            "epoch": epoch,
            "requested_prune_ratio": header.requested,
            "pruned_fraction": header.realised,
            "kept": header.num_kept,
            "num_samples": header.num_samples,
            **counts,
            **self._saver.collected,
            "compute": compute(counts, self._spec.before, self._step, self._spec.terms.sweep_part),
            "train_loss": loss,
            "train_accuracy": accuracy,
            **validated(validation, self._step.num_exits),
            "lr": lr,
            "world_size": self.world_size,
            "plan_hash": header.hash,
            "selection": dict(header.facts),
        }

    def _save(self, epoch: int, record: dict[str, Any], snapshot: EpochSnapshot, start: float) -> None:
        self._pulse.doing("saves, or waits for rank 0 to save")
        with self._timed("checkpoint"):
            self._saver.report()  # the epoch before this one: its files were written meanwhile
            state = self._saver.copied(self._network, self._step, snapshot.state) if self.rank == 0 else None
        self._seconds["epoch"] = time.perf_counter() - start
        self._saver.save(epoch + 1, record, self._seconds, state)

    def _share_buffers(self) -> None:
        """Give every rank rank 0's running statistics: the validation is one network's, and it is the saved one."""
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
