"""One rank's part of a pruned dataset, inside a training loop of the user's own.

    shard = rayprune.get_dataset_shard("train")
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)

As in any data-parallel loop, every rank must take the same batches: a rank's batch is its part of one global batch.

Shapes: B rows of a batch on this rank.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import Transport
from rayprune.engine.scoring.client import LoopClient
from rayprune.engine.scoring.loop_actor import LoopSettings
from rayprune.engine.scoring.messages import EpochSnapshot, Moment, PlanHeader, PlanPass, RankRows
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.user_loop.audit import audit_loop, check_audited
from rayprune.engine.user_loop.batch_sampler import ShardBatchSampler
from rayprune.engine.user_loop.collate import BatchFormat, CollateFn, collated
from rayprune.engine.user_loop.epoch_log import EpochLog
from rayprune.engine.user_loop.unweighed import UnweighedRows
from rayprune.errors import ConfigError, UsageError
from rayprune.nn.signals import TokenAxis, losses_per_sample, signals_per_sample, weighted_mean
from rayprune.sources import SampleSource
from rayprune.sources.datasets.columns import LABEL_COLUMNS
from rayprune.sources.tables.audits import AuditTable

logger = logging.getLogger(__name__)

STATE_SCHEMA = 1
_POLL_S = 0.02
_TASK_OUTPUTS = ("logits", "targets", "embeddings", "head")


def check_divisible(batch_size: int, num_workers: int) -> None:
    """Raise ConfigError unless the workers can share the rows of a global batch evenly."""
    if num_workers > 1 and batch_size % num_workers:
        more = batch_size + -batch_size % num_workers
        raise ConfigError(
            f"batch_size {batch_size} is not a multiple of {num_workers} workers: give prune(batch_size={more}), it is "
            "the global batch"
        )


def check_one_process() -> None:
    """Raise ConfigError in one of several processes that train together, where every one would train on all rows."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = torch.distributed.get_world_size()
    if count > 1:
        raise ConfigError(
            f"local_loader is for one process, and here {count} train together: use rayprune.prune with Ray Train, "
            "which gives each its own rows"
        )


class Shard:
    """One rank's part of every epoch of a pruned dataset; `get_dataset_shard` and `local_loader` return it.

    Args:
        session: the rank's session with the LoopActor, before its first epoch.
        transport: delivers the rows.
        settings: the settings of the pruned data.
        device: where batches go by default; None for the host.
        source: the data, if this process reads them.

    Attributes:
        rank, world_size, device: this worker's.
    """

    def __init__(
        self,
        session: ScoringSession[LoopClient],
        transport: Transport,
        settings: LoopSettings,
        device: torch.device | None,
        source: SampleSource | None = None,
    ) -> None:
        check_divisible(settings.batch_size, session.world_size)
        self.rank, self.world_size, self.device = session.rank, session.world_size, device
        self._session, self._transport, self._settings, self._source = session, transport, settings, source
        self._epoch, self._resume_step, self._resume_progress = 0, 0, 0.0
        # The Selector's newest state, if rank 0 has it: as loaded, or from the last barrier.
        self._selector: Mapping[str, Tensor] | None = None
        self._is_open = self._is_unweighed_loop = False
        self._current: Epoch | None = None

    @property
    def num_epochs(self) -> int:
        """The number of epochs of the whole run."""
        return self._settings.num_epochs

    @property
    def batch_rows(self) -> int:
        """The rows of a global batch on this rank."""
        return self._settings.batch_size // self.world_size

    @property
    def progress(self) -> float:
        """The fraction of the run's planned visits that were made, in [0, 1]; every epoch counts alike.

        It is what a learning-rate schedule needs: an epoch's number of steps changes with its selection.
        """
        inside = self._resume_progress if self._current is None else self._current.progress
        return min(1.0, (self._epoch + inside) / self.num_epochs)

    def __iter__(self) -> Iterator[Epoch]:
        """Yield the remaining epochs, as `epochs` does."""
        return self.epochs()

    def epochs(self) -> Iterator[Epoch]:
        """Yield the remaining epochs. When the loop's body ends, the next epoch's samples are selected.

        Raises:
            UsageError: called a second time.
        """
        if self._is_open:
            raise UsageError("epochs() can be iterated once: get a new shard for another pass")
        self._open()
        while self._epoch < self.num_epochs:
            self._selector, self._resume_progress = None, 0.0
            self._current = Epoch(self._session, self._transport, self._settings, self.device)
            self._current._is_unweighed_loop = self._is_unweighed_loop
            yield self._current
            self._close(with_state=self._epoch + 1 == self.num_epochs)

    def batch_sampler(self) -> ShardBatchSampler:
        """Return a batch sampler for a DataLoader of your own, instead of `Epoch.iter_torch_batches`.

        Iterate the DataLoader once in the body of every epoch, and give `weigh` its batches:

            loader = DataLoader(rayprune.torch.WithIds(dataset), batch_sampler=shard.batch_sampler(), num_workers=8)
            for epoch in shard.epochs():
                for x, y, ids in loader:
                    loss = epoch.weigh(ids, criterion(model(x), y))

        `dataset` must be the one that was pruned, in the same order. The last batch may hold rows of weight 0, which
        repeat others.

        Raises:
            UsageError: a filtered `ray.data.Dataset` was pruned, which has no plan.
        """
        if not self._transport.resumes_inside:
            raise UsageError("a filtered ray.data.Dataset has no plan to sample by: iterate epoch.iter_torch_batches()")
        return ShardBatchSampler(lambda: self._current_epoch("batch_sampler").iter_ids(), self._num_batches)

    def _num_batches(self) -> int:
        if self._current is None:  # a TypeError tells other libraries that there is no length yet
            raise TypeError("the number of batches is known in the body of `for epoch in shard.epochs()`")
        return len(self._current)

    def _current_epoch(self, call: str) -> Epoch:
        if self._current is None:
            raise UsageError(f"use {call} in the body of `for epoch in shard.epochs()`, before state_dict()")
        return self._current

    def scores(self) -> dict[str, Any]:
        """Return the method's scores, `last_visit` and `times_pruned`, name → (N,); NaN for unvisited samples.

        Inside the body of an epoch, the newest observations may be missing; between epochs all are in.
        """
        return self._session.client.scores()

    def audit(self, *, rule: str = "ensemble", at: float = 0.5, duplicates: bool = True) -> AuditTable:
        """Return what is probably wrong with the data, by the training visits so far.

        Call it after the loop, which gives `weigh` the logits. The network has trained on the labels, so that errors
        which it has memorized are not seen; `rayprune audit` trains networks for the purpose. If the loop has a run
        folder, rank 0 writes audit.parquet there, which `rayprune report` shows and `rayprune select` reads.

        Args:
            rule: how the probability of a wrong label is estimated, as `audit.rule` of a config.
            at: the probability from which on a label counts as a suspect.
            duplicates: also look for near-duplicates and outliers, which reads all samples in this process. A worker
                that gets its rows through Ray Data cannot: use `PrunedData.audit` after the training.

        Raises:
            UsageError: the loop was not given `audit=True`.
            ConfigError: an argument is wrong, nothing was observed, or other targets than the data's labels.
            DataError: the samples cannot be compared.
        """
        return audit_loop(
            self._session.client, self._source, rule=rule, at=at, duplicates=duplicates, write=self.rank == 0
        )

    def sweep(self, score: Callable[[Any], Any], **batch_format: Any) -> int:
        """Score, without gradients, the samples that the method wants scored but not trained on.

        Call it in the body of an epoch, after its batches. Without such samples nothing happens.

        Args:
            score: called with each batch; returns the losses (B,), or a mapping with `losses` and whatever else the
                method needs (`logits`, `targets`, `embeddings`, `head`, `mask`, `token_axis`).
            **batch_format: as for `Epoch.iter_torch_batches`.

        Returns:
            The number of samples scored on this rank.
        """
        return self._current_epoch("sweep").sweep(score, **batch_format)

    def state_dict(self) -> dict[str, Any]:
        """Return position, scores and current selection, to be saved with the model.

        Collective, like `ray.train.report`: every rank calls it at the same step, after `weigh`. Inside an epoch it is
        the state after the newest batch that was weighed; batches that a loader has fetched ahead come again. After the
        last batch (and the sweep, if there is one) it ends the epoch. Rank 0's state holds the scores, the other ranks'
        only the position: save rank 0's. It holds tensors, numbers and text, so that `torch.load(weights_only=True)`
        reads it.

        Raises:
            UsageError: called before the first epoch, before `weigh`, between the parts of a batch, or inside an epoch
                of a filtered Dataset.
        """
        if not self._is_open:
            raise UsageError("call state_dict() after `for epoch in shard.epochs()` has begun")
        epoch = self._current
        step = 0 if epoch is None else epoch._step_to_save()
        if epoch is not None and epoch.is_finished and step == epoch.step:
            self._close(with_state=True)
            epoch, step = None, 0
        elif epoch is not None:
            if not self._transport.resumes_inside:
                raise UsageError(
                    "a filtered ray.data.Dataset resumes at the end of an epoch: call state_dict() after its batches"
                )
            self._selector = _tensors(self._snapshot("snapshot", step))
        return {
            "schema": STATE_SCHEMA,
            "about": dict(self._settings.identity),
            "epoch": self._epoch,
            "step": step,
            "progress": 0.0 if epoch is None else step / max(1, epoch.num_steps),
            "selector": dict(self._selector or {}) if self.rank == 0 else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state; call it on every rank, with rank 0's state, before `epochs()`.

        Raises:
            ConfigError: the state is of a newer version, of other data or settings (it names them), or another rank's.
            UsageError: `epochs()` has begun.
        """
        if self._is_open:
            raise UsageError("call load_state_dict() before `for epoch in shard.epochs()`")
        if "about" not in state or "selector" not in state:
            raise ConfigError("this is not the state of a shard: give load_state_dict what state_dict() returned")
        if state.get("schema", 0) > STATE_SCHEMA:
            raise ConfigError(
                f"state of schema {state['schema']}, this version reads up to {STATE_SCHEMA}: upgrade rayprune"
            )
        saved = dict(state["about"])
        changed = [
            f"{name} {saved.get(name)!r} → {value!r}"
            for name, value in self._settings.identity.items()
            if saved.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"the state is of another run ({'; '.join(changed)}): start without it, or undo the change"
            )
        if not state["selector"]:
            raise ConfigError("the state holds no scores because another rank than 0 saved it: load rank 0's state")
        self._epoch, self._resume_step, self._selector = int(state["epoch"]), int(state["step"]), state["selector"]
        self._resume_progress = float(state.get("progress", 0.0))

    def _open(self) -> None:
        if self._session.client.is_local:
            check_one_process()
        self._is_open = True
        client, generation = self._session.client, self._session.generation
        if self.rank == 0:
            loaded = self._selector
            state = None if loaded is None else {name: tensor.cpu().numpy() for name, tensor in loaded.items()}
            # A finished run is restored, too, for its scores.
            client.restore(generation, min(self._epoch, self.num_epochs - 1), state)
        while client.generation() < generation:
            time.sleep(_POLL_S)  # until rank 0 has restored
        self._session.start_epoch(self._epoch, self._resume_step)

    def _close(self, *, with_state: bool) -> None:
        """End the current epoch, unless `state_dict` has."""
        epoch = self._current
        if epoch is None:
            return
        epoch._end()
        self._is_unweighed_loop = epoch.step > epoch.start_step and not epoch._unweighed.rows_weighed
        snapshot = self._snapshot("close", epoch.step, with_state=with_state)
        self._selector = _tensors(snapshot)
        if self._settings.has_run and self.rank == 0:
            epoch._written = self._session.client.log_epoch(epoch._line(snapshot, self.world_size))
        self._current = None
        self._epoch, self._resume_step = self._epoch + 1, 0
        self._session.start_epoch(self._epoch)

    def _snapshot(self, moment: Moment, step: int, *, with_state: bool = True) -> EpochSnapshot:
        """Wait for all ranks; rank 0's snapshot has the Selector's state."""
        return self._session.barrier(moment, step, with_state=with_state)


class Epoch:
    """One epoch of a Shard.

    Args:
        session, transport, settings, device: the Shard's; the session is in this epoch.

    Attributes:
        index: the epoch's number, from 0.
        num_steps: global batches of the whole epoch.
        start_step: the first step to train here; above 0 after a resume inside the epoch.
        step: the batches yielded so far, `start_step` included.
        num_kept, num_samples: the selection's.
        requested, realised: the requested prune ratio and the realised one.
        lr_scale: the factor that the method wants on the learning rate.
        plan_hash: of ids, weights and order.
    """

    def __init__(
        self,
        session: ScoringSession[LoopClient],
        transport: Transport,
        settings: LoopSettings,
        device: torch.device | None,
    ) -> None:
        self._session, self._transport, self._settings, self._default_device = session, transport, settings, device
        self.index, self.start_step = session.key.epoch, session.key.resume_step
        self._header = header = session.announce()
        self.num_steps, self.num_kept, self.num_samples = header.num_steps, header.num_kept, header.num_samples
        self.requested, self.realised = header.requested, header.realised
        self.lr_scale, self.plan_hash = header.lr_scale, header.hash
        self.step = self.start_step
        self._unweighed = UnweighedRows(f"epoch {self.index} on rank {session.rank}")
        self._is_iterated = self._is_exhausted = self._is_swept = self._has_ended = False
        self._is_unweighed_loop = False  # the Shard knows
        self._log = EpochLog(header)
        self._written: dict[str, Any] | None = None  # the line in the run folder
        if header.num_steps == 0:
            logger.warning(
                "epoch %d keeps %d samples, less than a batch, and last_batch is 'drop': nothing is trained",
                self.index,
                header.num_kept,
            )

    @property
    def is_finished(self) -> bool:
        """Whether all batches were taken and the sweep, if there is one, was made."""
        return self._is_exhausted and (self._is_swept or self._header.num_forward_only == 0)

    @property
    def progress(self) -> float:
        """The fraction of this epoch's planned visits that were made, in [0, 1].

        A visit is made when its batch is weighed. In a loop that weighed nothing in the epoch before, every batch but
        the newest counts.
        """
        if self._has_ended or not self.num_steps:
            return 1.0
        if not self._is_unweighed_loop or self._unweighed.rows_weighed:
            steps = self.start_step + self._unweighed.num_weighed
        else:
            steps = self.step if self._is_exhausted else max(self.start_step, self.step - 1)
        return min(1.0, steps / self.num_steps)

    def __index__(self) -> int:
        """Return the epoch's number, so that code written for `for epoch in range(...)` works."""
        return self.index

    def __len__(self) -> int:
        """Return the number of batches to train here."""
        return self.num_steps - self.start_step

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, as `iter_torch_batches` does without arguments."""
        return self.iter_torch_batches()

    def iter_torch_batches(
        self,
        *,
        device: torch.device | str | None = "auto",
        dtypes: torch.dtype | Mapping[str, torch.dtype] | None = None,
        collate_fn: CollateFn | None = None,
        prefetch_batches: int = 1,
    ) -> Iterator[Any]:
        """Yield this rank's part of each global batch, in the plan's order.

        Args:
            device: "auto" for this worker's device, None for the host.
            dtypes: a dtype for all floating-point columns, or dtypes by name.
            collate_fn: called with NumPy columns (including `id` and `weight`) instead of making tensors.
            prefetch_batches: how many batches a thread prepares ahead.

        Yields:
            The columns by name, with `id` (B,) int64 and `weight` (B,) float32 (0 for padding), or the result of
            collate_fn. B is the global batch divided by the number of workers.

        Raises:
            UsageError: the epoch was iterated before.
        """
        batch_format = BatchFormat(self._device(device), dtypes, collate_fn)
        self._start_iteration()
        for batch, loop_batch in collated(self._batches(self._header), batch_format, prefetch_batches):
            self._unweighed.add(batch, loop_batch)
            self.step += 1
            yield loop_batch
        self._is_exhausted = True

    def iter_ids(self) -> Iterator[list[int]]:
        """Yield the ids of this rank's part of each global batch, for rows that the loop reads itself.

        Yields:
            B ids; those of padding rows repeat other ids.

        Raises:
            UsageError: the epoch was iterated before.
        """
        self._start_iteration()
        for batch in self._session.batches(self._header, _ids_only):
            self._unweighed.add(batch, {"id": batch.ids})
            self.step += 1
            yield batch.ids.tolist()
        self._is_exhausted = True

    def weigh(
        self,
        batch: Any,
        losses: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        embeddings: Tensor | None = None,
        head: nn.Linear | Tensor | None = None,
        mask: Tensor | None = None,
        token_axis: TokenAxis = None,
    ) -> Tensor:
        """Record the losses and return their weighted mean, to be differentiated.

        The result is Σ(weight · loss) ÷ B with the constant B of this rank's batch, so that DDP's mean over the workers
        is the weighted mean over the global batch. For a part of a batch, or rows of several, B is their number,
        padding included. With gradient accumulation, divide the result like any mean loss.

        Args:
            batch: a batch that `iter_torch_batches` yielded, a copy or a part of it, or rows of several; anything with
                the key `id`. Or the ids alone, (B,) integers. Batches may come in any order, each row once.
            losses: (B,) or (B, 1, …). With `mask` or `token_axis` also (B, T, …), whose mean is a sample's loss.
            logits, targets, embeddings, head: for methods that need more than the loss, and for `audit=True`. `targets`
                defaults to the batch's `label` or `labels`; `head` is the last linear layer. See
                `rayprune.nn.signals.signals_per_sample`.
            mask: of the losses' shape, 0 for positions that do not count.
            token_axis: the axes of the losses that are positions of a sample (tokens, pixels): 1, or (1, 2).

        Raises:
            ConfigError: the losses are a scalar or of a wrong shape, ids do not wait to be weighed in this epoch on
                this worker, or the method needs something that is missing.
            UsageError: the epoch has ended.
        """
        if self._has_ended:
            raise UsageError(f"epoch {self.index} has ended: weigh its batches in the body of its loop")
        found = self._unweighed.find(batch)
        rows = found.batch
        losses_B = losses_per_sample(losses, rows.ids.size, mask, token_axis)
        outputs = _task_outputs(batch, {"logits": logits, "targets": targets, "embeddings": embeddings, "head": head})
        if self._settings.audits:
            check_audited(outputs["logits"], outputs["targets"])
        self._record(rows, losses_B, outputs, self._settings.signals)
        self._unweighed.remove(found)
        weights_B = torch.from_numpy(rows.weights.copy()) if rows.placed is None else rows.placed.weights
        weights_B = weights_B.to(losses_B.device, non_blocking=True)
        batch_rows = rows.ids.size if found.number is None else self._header.batch_rows
        return weighted_mean(losses_B, weights_B, batch_rows)

    def log(self, **metrics: Any) -> None:
        """Add numbers to this epoch's line in the run folder; without one, or on other ranks than 0, do nothing.

        Args:
            **metrics: numbers or text. Reports show `val_accuracy`, `train_accuracy` (in [0, 1]), `val_loss` and `lr`.

        Raises:
            ConfigError: rayprune writes a metric of this name itself, a value is neither a number nor text, or an
                accuracy is not in [0, 1].
        """
        self._log.add(metrics)
        if self._written is not None:  # state_dict() has ended the epoch; of two lines, the later one counts
            self._written = self._session.client.log_epoch({**self._written, **self._log.metrics})

    def sweep(self, score: Callable[[Any], Any], **batch_format: Any) -> int:
        """See Shard.sweep."""
        if self._header.num_forward_only == 0:
            return 0
        if self._is_swept:
            raise UsageError(f"epoch {self.index} was swept already: its samples are scored once")
        if not self._is_exhausted and len(self):
            raise UsageError("call sweep after the epoch's batches: it scores with the network that they have trained")
        self._is_swept, start = True, time.perf_counter()
        device = self._device(batch_format.pop("device", "auto"))
        num_prefetched = batch_format.pop("prefetch_batches", 1)
        num_scored, signals = 0, self._settings.sweep_signals
        self._session.recorder.start_sweep(signals)
        batches = self._batches(self._session.announce("forward"))
        with torch.no_grad():
            for batch, loop_batch in collated(batches, BatchFormat(device, **batch_format), num_prefetched):
                result = score(loop_batch)
                results = dict(result) if isinstance(result, Mapping) else {"losses": result}
                mask, token_axis = results.get("mask"), results.get("token_axis")
                losses_B = losses_per_sample(results["losses"], batch.ids.size, mask, token_axis)
                outputs = _task_outputs(loop_batch, {name: results.get(name) for name in _TASK_OUTPUTS})
                self._record(batch, losses_B, outputs, signals)
                num_scored += int(batch.real.sum())
        self._log.forward_only_s = time.perf_counter() - start
        return num_scored

    def _step_to_save(self) -> int:
        """Return the step after the newest weighed batch, where a saved state resumes.

        Raises:
            UsageError: nothing was weighed yet, or only a part of the newest batch.
        """
        if self._unweighed.is_inside_batch:
            raise UsageError("call state_dict() after weigh: only a part of the newest batch was weighed")
        if self._unweighed.rows_weighed:
            if self._unweighed.num_skipped and self._settings.signals:
                logger.warning(
                    "epoch %d: state_dict() was called with %d batches that were not weighed and come before one that "
                    "was: a resumed run does not train on them",
                    self.index,
                    self._unweighed.num_skipped,
                )
            return self.step - self._unweighed.num_ahead
        if self.step > self.start_step and self._settings.signals:
            raise UsageError("call state_dict() after weigh: the state would lack the last batch")
        return self.step

    def _end(self) -> None:
        """Refuse further batches, and warn if the loop did not take or weigh all: scores are then out of date."""
        self._has_ended = True
        num_taken, num_weighed = self.step - self.start_step, self._unweighed.num_weighed
        if num_taken > num_weighed and self._settings.signals:
            logger.warning(
                "epoch %d: weigh was called for %d of %d batches; call it for each, or the method learns nothing of it",
                self.index,
                num_weighed,
                num_taken,
            )
        if num_taken < len(self):
            logger.warning("epoch %d ended after %d of %d batches", self.index, num_taken, len(self))

    def _line(self, snapshot: EpochSnapshot, world_size: int) -> dict[str, Any]:
        """Return the epoch's line for the run folder."""
        num_forwarded = self._header.num_forward_only if self._is_swept else 0
        return self._log.line(snapshot, self.step, num_forwarded, world_size)

    def _start_iteration(self) -> None:
        if self._is_iterated:
            raise UsageError(
                f"epoch {self.index} was iterated already: iterate each one once; num_epochs sets how many there are"
            )
        self._is_iterated = True

    def _batches(self, header: PlanHeader) -> Iterator[Batch]:
        return self._session.batches(header, self._transport.batches)

    def _device(self, device: torch.device | str | None) -> torch.device | None:
        if device == "auto":
            return self._default_device
        return None if device is None else torch.device(device)

    def _record(self, batch: Batch, losses_B: Tensor, outputs: Mapping[str, Any], signals: tuple[str, ...]) -> None:
        self._session.recorder.record(batch.ids, batch.real, signals_per_sample(signals, losses_B, **outputs))


def _tensors(snapshot: EpochSnapshot) -> dict[str, Tensor]:
    """Return the Selector's state on rank 0, and nothing on the others."""
    return {name: torch.from_numpy(array.copy()) for name, array in snapshot.state.items()}


def _ids_only(plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
    """Yield batches without columns, as a Transport does."""
    for ids, weights, real in spans:
        for start in range(0, ids.size, batch_rows):
            rows = slice(start, start + batch_rows)
            yield Batch({}, ids[rows], weights[rows], real[rows])


def _task_outputs(batch: Any, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the targets from the batch's labels, on the logits' device."""
    targets, logits = outputs["targets"], outputs["logits"]
    if targets is None and isinstance(batch, Mapping):
        labels = (batch[name] for name in LABEL_COLUMNS if isinstance(batch.get(name), Tensor))
        targets = next(labels, None)
    if targets is not None and logits is not None:
        targets = targets.to(logits.device)
    return {**outputs, "targets": targets}
