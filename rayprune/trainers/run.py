"""The epochs of a run inside somebody else's trainer: each one's plan, its observations, the position, the state.

Every process (rank) holds the same Selector. Observations stay with the rank that made them until the epoch ends or a
state is saved. Then all ranks exchange them, so that all select the same samples for the next epoch. Nothing but
`torch.distributed` is needed, which the trainer has set up.

A *batch* here is one forward pass: B rows on each of W ranks, W·B rows of the plan. With gradient accumulation, A
batches make one optimizer step.

Shapes: N samples, B rows of a batch on this rank, b of them real (b < B only in an epoch's last batch).
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from rayprune.core.method import Method
from rayprune.core.plan import LastBatch, Plan
from rayprune.core.selector import Selector
from rayprune.core.validation import short_repr
from rayprune.engine.scoring.messages import AttemptKey, Push, unpack
from rayprune.engine.scoring.recorder import Recorder
from rayprune.errors import ConfigError, UsageError
from rayprune.methods.fixed import Fixed
from rayprune.nn.signals import TokenAxis, losses_per_sample, signals_per_sample, weighted_mean
from rayprune.sources.datasets.columns import LABEL_COLUMNS
from rayprune.sources.tables.selections import read_selection_file

logger = logging.getLogger(__name__)

STATE_SCHEMA = 1
# The key of the ids in a batch that is a mapping: (b,) int64 NumPy, which stay on the host; ~id for padding.
ID_KEY = "id"
_SPAN_ROWS = 65_536


@dataclass(frozen=True)
class PlannedBatch:
    """This rank's real rows of a batch.

    Attributes:
        ids: (b,) int64; empty if the rank has only padding.
        weights: (b,) float32.
        mean_rows: real rows of the batch over all ranks, divided by W: with this divisor, the mean of the ranks' sums
            is the mean over the batch.
        is_plain: every row of the batch, on every rank, is real and has the weight 1.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    mean_rows: float
    is_plain: bool


@dataclass(frozen=True)
class _Span:
    """This rank's rows of consecutive batches, each (batches, B)."""

    steps: range
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    real: NDArray[np.bool_]


class PlannedRun:
    """Plan the epochs of a run, and keep its scores, on one rank.

    Args:
        method: the selection method.
        num_samples: N.
        num_epochs: the epochs of the whole run; may end inside an epoch, as 2.5 does.
        batch_rows: B.
        seed: with the observations, it determines every selection and every order.
        labels: (N,) integers from 0, for methods that need them.
        last_batch: `pad` trains on all kept samples; `drop` leaves out an epoch's incomplete last batch.
        accumulation: A, batches of an optimizer step.
        rank, world_size: this process, and W.

    Attributes:
        selector: has the scores.
        epoch: the current epoch, -1 before the first.
        step: the batches of the epoch that were trained.
        has_ended: whether `end_epoch` was called.
        plan: the current epoch's.

    Raises:
        ConfigError: the method cannot work inside a trainer, or an argument is out of range.
    """

    def __init__(
        self,
        method: Method,
        num_samples: int,
        num_epochs: float,
        batch_rows: int,
        *,
        seed: int = 0,
        labels: ArrayLike | None = None,
        last_batch: LastBatch = "pad",
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_method(method)
        _check_position(rank, world_size, accumulation)
        if not isinstance(num_epochs, int | float) or not 0 < num_epochs < math.inf:
            raise ConfigError(f"num_epochs {short_repr(num_epochs)} must be a number above 0")
        if last_batch not in ("pad", "drop"):
            raise ConfigError(f"last_batch {short_repr(last_batch)} must be 'pad' or 'drop'")
        if isinstance(batch_rows, bool) or not isinstance(batch_rows, int | np.integer) or batch_rows < 1:
            raise ConfigError(
                f"batch size {short_repr(batch_rows)} must be an integer of at least 1: rows of a process's batch"
            )
        chosen = None
        if isinstance(method, Fixed):
            chosen = read_selection_file(_path_of(method), num_samples).selection(num_samples)
        self.selector = Selector(method, num_samples, math.ceil(num_epochs), seed, labels, chosen=chosen)
        self.num_epochs, self.batch_rows, self.last_batch = num_epochs, int(batch_rows), last_batch
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.epoch, self.step = -1, 0
        self.plan = Plan.in_order(num_samples, self.global_rows)
        self._resume_rows = 0
        self._pending: list[Push] = []
        self._recorder = Recorder(self, rank, method.signals)  # the Recorder pushes to `observe`
        self._resume_epoch = 0
        self.has_ended = False
        self._span: _Span | None = None

    @property
    def global_rows(self) -> int:
        """W·B."""
        return self.batch_rows * self.world_size

    @property
    def num_batches(self) -> int:
        """The batches of the whole current epoch."""
        return self.plan.num_steps

    @property
    def num_updates(self) -> int:
        """The optimizer steps of the whole current epoch."""
        return -(-self.plan.num_steps // self.accumulation)

    @property
    def num_full_updates(self) -> int:
        """The optimizer steps of a run without pruning, for learning-rate schedules; exact for a fixed subset."""
        rows, method = self.selector.num_samples, self.selector.method
        if method.fixed and not method.collect_epochs:
            rows = self.selector.begin_epoch(max(0, self.selector.epoch)).num_kept
        batches = rows // self.global_rows if self.last_batch == "drop" else -(-rows // self.global_rows)
        return math.ceil(self.num_epochs * -(-batches // self.accumulation))

    @property
    def lr_scale(self) -> float:
        """The factor that the method wants on the learning rate in the current epoch."""
        return self.selector.begin_epoch(self.epoch).lr_scale if self.epoch >= 0 else 1.0

    @property
    def progress(self) -> float:
        """The fraction of the run's planned optimizer steps that were made, in [0, 1]; every epoch counts alike."""
        if self.epoch < 0:
            return 0.0
        inside = self._updates_made / self.num_updates if self.num_updates else 1.0
        return min(1.0, (self.epoch + inside) / self.num_epochs)

    @property
    def next_position(self) -> tuple[int, int]:
        """The epoch and its batch where training goes on: the next epoch's first after an epoch's last."""
        if self.epoch < 0:
            return 0, 0
        return (self.epoch + 1, 0) if self.step >= self.num_batches else (self.epoch, self.step)

    @property
    def updates_left(self) -> int:
        """The optimizer steps of the current epoch that the run still has, fewer if the run ends inside the epoch."""
        last = math.ceil(min(1.0, self.num_epochs - self.epoch) * self.num_updates - 1e-9)
        return max(0, last - self._updates_made)

    @property
    def _updates_made(self) -> int:
        """The optimizer steps that were made in the current epoch; its last incomplete group makes one, too."""
        return self.num_updates if self.step == self.num_batches else self.step // self.accumulation

    def begin_epoch(self, epoch: int) -> None:
        """Plan an epoch; repeated calls change nothing. Collective when the epoch before has not ended."""
        if epoch == self.epoch:
            return
        self.end_epoch()
        selection = self.selector.begin_epoch(epoch)
        if selection.num_scored:
            raise ConfigError(
                f"method {self.selector.method.name!r} scores samples in passes without training, which a trainer does "
                "not make: use it in rayprune train, or in a loop of your own"
            )
        self.plan = Plan.of_selection(selection, self.global_rows, self.selector.seed, epoch, self.last_batch)
        if not self.plan.num_steps:
            raise ConfigError(
                f"epoch {epoch} keeps {selection.num_kept} samples, which is less than a batch of {self.global_rows}, "
                "and the incomplete last batch is dropped: keep it, or lower the batch size or the prune ratio"
            )
        self.epoch, self.step, self.has_ended, self._span = epoch, 0, False, None
        if self._resume_rows:
            self.step, self._resume_rows = self._step_of(self._resume_rows), 0
        self._recorder.start_epoch(AttemptKey(0, epoch, self.step))

    def codes(self) -> Iterator[list[int]]:
        """Yield this rank's batches that are left of the epoch: B codes each, the id of a real row, ~id of padding."""
        steps = max(1, _SPAN_ROWS // self.batch_rows)
        plan = self.plan
        for start in range(self.step, plan.num_steps, steps):
            ids, _, real = plan.rank_rows(self.rank, self.world_size, start, min(start + steps, plan.num_steps))
            codes = np.where(real, ids, ~ids).reshape(-1, self.batch_rows)
            yield from codes.tolist()

    def next_batch(self) -> PlannedBatch:
        """Return the batch that comes next in training.

        Raises:
            UsageError: no epoch has begun, or all its batches were trained.
        """
        if not 0 <= self.step < self.num_batches or self.epoch < 0:
            raise UsageError(f"epoch {self.epoch} has {self.num_batches} batches, and all were trained: begin the next")
        if self._span is None or self.step not in self._span.steps:
            self._span = self._load_span()
        span, row = self._span, self.step - self._span.steps.start
        is_real = span.real[row]
        rows = min(self.plan.num_rows - self.step * self.global_rows, self.global_rows)
        first = self.step * self.global_rows
        is_plain = rows == self.global_rows and bool((self.plan.weights(first, first + rows) == 1.0).all())
        return PlannedBatch(span.ids[row][is_real], span.weights[row][is_real], rows / self.world_size, is_plain)

    def _load_span(self) -> _Span:
        stop = min(self.step + max(1, _SPAN_ROWS // self.batch_rows), self.num_batches)
        ids, weights, real = self.plan.rank_rows(self.rank, self.world_size, self.step, stop)
        shape = (-1, self.batch_rows)
        return _Span(range(self.step, stop), ids.reshape(shape), weights.reshape(shape), real.reshape(shape))

    def check_ids(self, ids: ArrayLike, batch: PlannedBatch) -> None:
        """Compare a batch's ids with the plan's.

        Raises:
            UsageError: they differ: something else has sharded, skipped or reordered the batches.
        """
        given = np.asarray(ids)
        if not np.array_equal(given, batch.ids):
            raise UsageError(
                f"epoch {self.epoch}, batch {self.step}, rank {self.rank}: the trainer brought ids "
                f"{short_repr(given[:5].tolist())}, and the plan has {short_repr(batch.ids[:5].tolist())}: leave out "
                "whatever else shards, skips or shuffles (a sampler, skip_first_batches), and weigh every batch once"
            )

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
        """Record a whole batch's losses and return their weighted mean, to be differentiated.

        DDP's mean of the ranks' results is the mean over the batch of all ranks. With gradient accumulation, divide the
        result like any mean loss.

        Args:
            batch: as the loader gave it, with its ids: the key `id` of a mapping, the last element of a tuple.
            losses: (b,), not reduced; with `mask` or `token_axis` also (b, T, …), whose mean is a sample's loss.
            logits, targets, embeddings, head, mask, token_axis: as for `rayprune.Epoch.weigh`.

        Raises:
            ConfigError: the losses are of a wrong shape, the batch has no ids, or the method needs something more.
            UsageError: the batch is not the plan's next one.
        """
        (ids, rest), planned = split_ids(batch), self.next_batch()
        self.check_ids(ids[ids >= 0], planned)
        losses_B = losses_per_sample(losses, ids.size, mask, token_axis)
        if not planned.ids.size:  # a row of padding, so that all ranks make the same forward passes
            self.record(planned, {})
            return losses_B.sum() * 0.0
        if targets is None and isinstance(rest, Mapping):
            targets = next((rest[name] for name in LABEL_COLUMNS if isinstance(rest.get(name), Tensor)), None)
        names = self.selector.method.signals
        signals = signals_per_sample(names, losses_B, logits=logits, targets=targets, embeddings=embeddings, head=head)
        self.record(planned, signals)
        weights_B = torch.from_numpy(planned.weights).to(losses_B.device, non_blocking=True)
        return weighted_mean(losses_B, weights_B, planned.mean_rows)

    def record(self, batch: PlannedBatch, signals: dict[str, Tensor]) -> None:
        """Record a trained batch's signals, name → (b, …), and move on to the next batch."""
        self._recorder.record(batch.ids, np.ones(batch.ids.size, dtype=bool), signals)
        self.step += 1

    def observe(self, key: AttemptKey, push: Push, *, wait: bool = True) -> None:
        """Keep a push of the Recorder for the next exchange."""
        self._pending.append(push)

    def exchange(self) -> None:
        """Fold the observations of all ranks; collective."""
        if self.epoch < 0:
            return
        self._recorder.push()
        own, self._pending = self._pending, []
        for push in _gathered(own, self.world_size):
            signals = unpack(push.layout, push.buffer)
            self.selector.observe(signals.pop("id"), signals, self.epoch)

    def end_epoch(self) -> None:
        """Fold the epoch's observations; collective, and once an epoch. Warns of batches that were not weighed."""
        if self.epoch < 0 or self.has_ended:
            return
        self.has_ended = True
        self.exchange()
        if self.step < self.num_batches and self.selector.method.signals and self.progress < 1.0:
            logger.warning(
                "epoch %d ended after %d of %d batches: the others keep the scores that they had",
                self.epoch,
                self.step,
                self.num_batches,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return position and scores, for a checkpoint; collective. It holds tensors, numbers and text."""
        self.exchange()
        epoch, step = self.next_position
        state = {name: torch.from_numpy(np.array(array)) for name, array in self.selector.state_dict().items()}
        return {
            "schema": STATE_SCHEMA,
            "about": self._about(),
            "epoch": epoch,
            "rows": step * self.global_rows,
            "progress": self.progress,
            "selector": state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; every rank loads the same. The number of processes and B may have changed.

        Raises:
            ConfigError: it is no such state, of a newer version, or of other settings.
            RunFolderError: it is of another method.
        """
        if "selector" not in state or "about" not in state:
            raise ConfigError("this is not a state of rayprune: give what state_dict() returned")
        if state.get("schema", 0) > STATE_SCHEMA:
            raise ConfigError(
                f"state of schema {state['schema']}, this version reads up to {STATE_SCHEMA}: upgrade rayprune"
            )
        saved, own = dict(state["about"]), self._about()
        if changed := [
            f"{name} {saved.get(name)!r} → {value!r}" for name, value in own.items() if saved.get(name) != value
        ]:
            raise ConfigError(
                f"the state is of another run ({'; '.join(changed)}): start without it, or undo the change"
            )
        arrays = {name: np.array(tensor.cpu().numpy()) for name, tensor in state["selector"].items()}
        self.selector.load_state_dict(arrays)
        self._pending, self.epoch = [], -1
        self._resume_epoch = int(state["epoch"])
        # A state of a finished run goes on after the last epoch's last batch.
        is_finished = self._resume_epoch >= self.selector.num_epochs
        self._resume_rows = sys.maxsize if is_finished else int(state["rows"])

    @property
    def resume_epoch(self) -> int:
        """The epoch where a loaded state goes on, num_epochs if it is of a finished run; 0 without one."""
        return self._resume_epoch

    def _about(self) -> dict[str, Any]:
        # The steps of the run: with others, a restored learning-rate schedule would be at the wrong place.
        return {
            "num_samples": self.selector.num_samples,
            "num_epochs": self.num_epochs,
            "seed": self.selector.seed,
            "last_batch": self.last_batch,
            "num_steps": self.num_full_updates,
        }

    def _step_of(self, rows: int) -> int:
        if rows % self.global_rows and rows < self.plan.order.size:
            raise ConfigError(
                f"the state is {rows} rows into epoch {self.epoch}, which is not a whole number of batches of "
                f"{self.global_rows}: resume with a number of processes and a batch size whose product divides {rows}"
            )
        return min(self.num_batches, -(-rows // self.global_rows))


def split_ids(batch: Any) -> tuple[NDArray[np.int64], Any]:
    """Return a batch's ids and the rest: the key `id` of a mapping, or the last element of a sequence.

    Raises:
        ConfigError: it has no ids.
    """
    if isinstance(batch, Mapping) and ID_KEY in batch:
        return np.asarray(batch[ID_KEY]), {name: value for name, value in batch.items() if name != ID_KEY}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[-1], np.ndarray):
        return batch[-1], batch[:-1]
    raise ConfigError(
        f"the batch ({type(batch).__name__}) has no ids: pass weigh the batch as the loader gave it, a mapping "
        "with the key 'id' or a tuple that ends with the ids"
    )


def _gathered(own: list[Push], world_size: int) -> list[Push]:
    """Return the pushes of all ranks, in order of the ranks."""
    if world_size == 1:
        return own
    by_rank: list[list[Push]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(by_rank, own)
    return [push for pushes in by_rank for push in pushes]


def check_method(method: Any) -> None:
    """Raise ConfigError if a method needs more than the losses of a trainer's own steps."""
    if not isinstance(method, Method):
        return  # the Selector says so
    step = method.step()[0]
    how = ""
    if step == "in_batch":
        how = "picks rows inside a train step"
    elif step != "plain":
        how = f"needs the train step {step!r}"
    elif method.sweep_signals:
        how = "needs passes without training"
    elif method.cost and not method.fixed:
        how = f"needs {method.cost}"
    if how:
        raise ConfigError(f"method {method.name!r} {how}, which a trainer does not make: use it in rayprune train")


def _check_position(rank: int, world_size: int, accumulation: int) -> None:
    for name, value in (("world_size", world_size), ("accumulation", accumulation)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} {short_repr(value)} must be an integer of at least 1")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank!r} is not one of {world_size} processes: give 0 to {world_size - 1}")


def _path_of(method: Fixed) -> str:
    if not method.path:
        raise ConfigError("method Fixed needs a file of samples: give path=, such as rayprune select writes")
    return method.path
