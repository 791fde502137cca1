"""One rank's view of a pruned data set, inside a training loop of the user's own.

    shard = rayprune.get_dataset_shard("train")
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)

Every rank must take the same batches, as in any data-parallel loop: rank r's batch is its share of one global batch.

One epoch of a Shard: its batches, and what a loop does with their losses.

Shapes: B rows of this worker's share of a global batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.engine.data.batch import Batch
from rayprune.engine.data.device import BatchForm, Collate, collated
from rayprune.engine.data.transport import Transport
from rayprune.engine.scoring.actor import LoopSettings
from rayprune.engine.scoring.client import LoopClient
from rayprune.engine.scoring.messages import Moment, PlanHeader
from rayprune.engine.scoring.session import ScoringSession
from rayprune.errors import ConfigError, UsageError
from rayprune.nn.signals import losses_per_sample, signals_per_sample, weighted_mean

logger = logging.getLogger(__name__)


class Epoch:
    """One epoch of a Shard, announced when it is made.

    Args:
        session: in this epoch.
        transport: how rows come.
        terms: what all ranks must know.
        device: where batches go unless a loop says otherwise; None for the host.

    Attributes:
        index: 0-based.
        num_steps: global batches in the whole epoch.
        start_step: the first one to be trained here; above 0 after a resume inside the epoch.
        num_kept, num_samples: of the selection.
        requested, realised: prune ratio asked for, and what it came to.
        lr_scale: what the method wants the learning rate multiplied by.
        plan_hash: of ids, weights and order.
    """

    def __init__(
        self,
        session: ScoringSession[LoopClient],
        transport: Transport,
        terms: LoopSettings,
        device: torch.device | None,
    ) -> None:
        self._session, self._transport, self._terms, self._own_device = session, transport, terms, device
        self.index, self.start_step = session.key.epoch, session.key.resume_step
        self._header = header = session.announce()
        self.num_steps, self.num_kept, self.num_samples = header.num_steps, header.num_kept, header.num_samples
        self.requested, self.realised = header.requested, header.realised
        self.lr_scale, self.plan_hash = header.lr_scale, header.hash
        self.step, self._num_weighed = self.start_step, 0
        self._batch: Batch | None = None
        self._given: Any = None
        self._iterated = self._exhausted = self._swept = False
        if header.num_steps == 0:
            logger.warning(
                "epoch %d keeps %d samples, less than a batch, and last_batch is 'drop': nothing is trained",
                self.index,
                header.num_kept,
            )

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all batches were taken, and the sweep made where the method asks for one."""
        return self._exhausted and (self._swept or self._header.num_forward_only == 0)

    def __index__(self) -> int:
        """Return the epoch's number, so that `int(epoch)` is what it was in `for epoch in range(...)`."""
        return self.index

    def __len__(self) -> int:
        """Return the batches that are left to train here."""
        return self.num_steps - self.start_step

    def iter_torch_batches(
        self,
        *,
        device: torch.device | str | None = "auto",
        dtypes: torch.dtype | Mapping[str, torch.dtype] | None = None,
        collate_fn: Collate | None = None,
        prefetch_batches: int = 1,
    ) -> Iterator[Any]:
        """Yield this rank's share of each global batch, in the plan's order.

        Args:
            device: "auto" is this worker's device; None leaves tensors on the host.
            dtypes: of the data's floating columns, or of any by name.
            collate_fn: called with NumPy columns (`id` and `weight` among them) instead of making tensors.
            prefetch_batches: made ahead in a thread.

        Yields:
            The data's columns by name with `id` (B,) int64 and `weight` (B,) float32 (0 for padding), or what
            collate_fn returned. B is the global batch ÷ the workers, always.

        Raises:
            RuntimeError: the epoch was iterated before.
        """
        if self._iterated:
            raise UsageError(f"epoch {self.index} was iterated already: its samples are to be trained on once")
        form = BatchForm(self._device(device), dtypes, collate_fn)
        self._iterated = True
        for batch, given in collated(self._batches(self._header), form, prefetch_batches):
            self._batch, self._given = batch, given
            self.step += 1
            yield given
        self._exhausted = True

    def _device(self, device: torch.device | str | None) -> torch.device | None:
        if device == "auto":
            return self._own_device
        return None if device is None else torch.device(device)

    def _batches(self, header: PlanHeader) -> Iterator[Batch]:
        return self._session.batches(header, self._transport.batches)

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
    ) -> Tensor:
        """Record the losses and return the weighted mean, to be differentiated.

        It is Σ(weight · loss) ÷ B with the constant B of this worker's share, so that DDP's mean over the workers is
        the weighted mean over the global batch. With gradient accumulation, divide it as you would any mean loss.

        Args:
            batch: the batch that `iter_torch_batches` gave last.
            losses: (B,), or (B, T), (B, 1, …): then a sample's loss is the mean over the other axes.
            logits, targets, embeddings, head: for methods that need more than the loss; targets default to the
                batch's `label`, head is the last linear layer. See `rayprune.nn.signals.signals_per_sample`.
            mask: of the losses' shape, 0 where a position does not count.

        Raises:
            ValueError: a scalar, another batch, a wrong shape, or something the method needs is missing.
        """
        current = self._batch
        if current is None or batch is not self._given:
            raise ConfigError(
                "weigh belongs to the batch that iter_torch_batches gave last, and is called once for it: give it that "
                "batch itself"
            )
        losses_B = losses_per_sample(losses, current.ids.size, mask)
        needed = self._needed(batch, logits, targets, embeddings, head)
        self._record(current, losses_B, needed, self._terms.signals)
        self._batch = self._given = None
        self._num_weighed += 1
        weights_B = torch.from_numpy(current.weights.copy()) if current.placed is None else current.placed.weights
        weights_B = weights_B.to(losses_B.device, non_blocking=True)
        return weighted_mean(losses_B, weights_B, self._header.batch_rows)

    def _needed(self, batch: Any, logits: Any, targets: Any, embeddings: Any, head: Any) -> dict[str, Any]:
        if targets is None and isinstance(batch, Mapping) and isinstance(batch.get("label"), Tensor):
            targets = batch["label"]
        if targets is not None and logits is not None:
            targets = targets.to(logits.device)
        return {"logits": logits, "targets": targets, "embeddings": embeddings, "head": head}

    def _record(self, batch: Batch, losses_B: Tensor, needed: Mapping[str, Any], names: tuple[str, ...]) -> None:
        signals = signals_per_sample(names, losses_B, **needed)
        self._session.recorder.record(batch.ids, batch.real, signals)

    def sweep(self, score: Callable[[Any], Any], **form: Any) -> int:
        if self._header.num_forward_only == 0:
            return 0
        if self._swept:
            raise UsageError(f"epoch {self.index} was swept already: its samples are to be scored once")
        self._swept = True
        header = self._session.announce("forward")
        device = self._device(form.pop("device", "auto"))
        ahead = form.pop("prefetch_batches", 1)
        scored, swept = 0, self._terms.sweep_signals
        self._session.recorder.start_sweep(swept)
        with torch.no_grad():
            for batch, given in collated(self._batches(header), BatchForm(device, **form), ahead):
                said = score(given)
                told = dict(said) if isinstance(said, Mapping) else {"losses": said}
                losses_B = losses_per_sample(told.pop("losses"), batch.ids.size, told.pop("mask", None))
                given_for = (told.get(name) for name in ("logits", "targets", "embeddings", "head"))
                self._record(batch, losses_B, self._needed(given, *given_for), swept)
                scored += int(batch.real.sum())
        return scored

    def check_recorded(self) -> None:
        """Refuse a state that would lack the losses of the batch that was given last."""
        if self._batch is not None and self._terms.signals:
            raise UsageError("state_dict() comes after weigh: the state would lack the batch that was given last")

    def check_weighed(self) -> None:
        """Say so where a loop did not weigh what it was given: its scores are then those of an earlier epoch."""
        given = self.step - self.start_step
        if given > self._num_weighed and self._terms.signals:
            logger.warning(
                "epoch %d: weigh was called for %d of %d batches; the method learns nothing of the others",
                self.index,
                self._num_weighed,
                given,
            )
        if given < len(self):
            logger.warning("epoch %d ended after %d of %d batches", self.index, given, len(self))


STATE_SCHEMA = 1
_POLL_S = 0.02


class Shard:
    """One rank's share of every epoch of a pruned data set.

    Args:
        session: with the LoopActor, not begun.
        transport: how rows come.
        terms: what all ranks must know.
        device: where batches and losses live unless a loop says otherwise; None for the host.
    """

    def __init__(
        self,
        session: ScoringSession[LoopClient],
        transport: Transport,
        terms: LoopSettings,
        device: torch.device | None,
    ) -> None:
        if terms.batch_size % session.world_size:
            raise ConfigError(
                f"batch_size {terms.batch_size} does not divide by {session.world_size} workers: give "
                "prune(batch_size=) a multiple, it is the global batch"
            )
        self.rank, self.world_size, self.device = session.rank, session.world_size, device
        self._session, self._transport, self._terms = session, transport, terms
        self._epoch, self._resume_step = 0, 0
        # The Selector's state where rank 0 has the newest: what was loaded, and what the last barrier gave.
        self._selector: Mapping[str, Tensor] | None = None
        self._opened = False
        self._current: Epoch | None = None

    @property
    def num_epochs(self) -> int:
        """The epochs of the whole run."""
        return self._terms.num_epochs

    @property
    def batch_rows(self) -> int:
        """This rank's share of a global batch."""
        return self._terms.batch_size // self.world_size

    def epochs(self) -> Iterator[Epoch]:
        """Yield the epochs that are left; each is closed, and the next one's samples chosen, when its body ends.

        Raises:
            RuntimeError: called a second time.
        """
        if self._opened:
            raise UsageError("epochs() can be iterated once: get a new shard for another pass")
        self._open()
        while self._epoch < self.num_epochs:
            self._selector = None
            self._current = Epoch(self._session, self._transport, self._terms, self.device)
            yield self._current
            self._close(with_state=self._epoch + 1 == self.num_epochs)

    def _open(self) -> None:
        self._opened = True
        client, generation = self._session.client, self._session.generation
        if self.rank == 0:
            loaded = self._selector
            state = None if loaded is None else {name: tensor.cpu().numpy() for name, tensor in loaded.items()}
            # A finished run is restored too: its scores are asked for.
            client.restore(generation, min(self._epoch, self.num_epochs - 1), state)
        while client.generation() < generation:
            time.sleep(_POLL_S)  # rank 0 restores first
        self._session.start_epoch(self._epoch, self._resume_step)

    def _close(self, *, with_state: bool) -> None:
        """Close the running epoch, unless `state_dict` has done so."""
        epoch = self._current
        if epoch is None:
            return
        epoch.check_weighed()
        self._selector = self._barrier("close", epoch.step, with_state=with_state)
        self._current = None
        self._epoch, self._resume_step = self._epoch + 1, 0
        self._session.start_epoch(self._epoch)

    def _barrier(self, moment: Moment, step: int, *, with_state: bool = True) -> dict[str, Tensor]:
        """Wait for all ranks; return the Selector's state on rank 0, nothing on the others."""
        snapshot = self._session.barrier(moment, step, with_state=with_state)
        return {name: torch.from_numpy(array.copy()) for name, array in snapshot.state.items()}

    def scores(self) -> dict[str, Any]:
        """Return the method's scores, `last_visit` and `times_pruned`, name → (N,); NaN where never visited.

        Inside an epoch's body the newest observations may still be under way; between epochs all are in.
        """
        return self._session.client.scores()

    def sweep(self, score: Callable[[Any], Any], **form: Any) -> int:
        """Score the samples that the method asks to see without training, such as those left out; no gradients.

        Call it in an epoch's body, after its batches. Nothing happens where the method asks for none.

        Args:
            score: called with each batch; returns the losses (B,), or a mapping with `losses` and, where the method
                needs them, `logits`, `targets`, `embeddings`, `head`.
            **form: as for `iter_torch_batches`.

        Returns:
            How many samples of this rank were scored.
        """
        if self._current is None:
            raise UsageError("sweep belongs into the body of `for epoch in shard.epochs()`, before state_dict()")
        return self._current.sweep(score, **form)

    def state_dict(self) -> dict[str, Any]:
        """Return position, scores and current selection, to be saved with the model.

        Collective: every rank calls it at the same step (as `ray.train.report`), after weigh. Inside an epoch it is the
        state before the next batch; after the batches (and the sweep, where there is one to make) it closes the epoch.
        Rank 0's holds the scores, the others' the position: save rank 0's. It holds tensors, numbers and text only, so
        that `torch.load(weights_only=True)` reads it.
        """
        if not self._opened:
            raise UsageError("state_dict() has something to say once `for epoch in shard.epochs()` has begun")
        epoch = self._current
        if epoch is not None:
            epoch.check_recorded()
        if epoch is not None and epoch.finished:
            self._close(with_state=True)
            epoch = None
        elif epoch is not None:
            if not self._transport.resumes_inside:
                raise UsageError(
                    "a filtered ray.data.Dataset resumes at epoch ends: call state_dict() after the epoch's batches"
                )
            self._selector = self._barrier("snapshot", epoch.step)
        return {
            "schema": STATE_SCHEMA,
            "about": dict(self._terms.about),
            "epoch": self._epoch,
            "step": 0 if epoch is None else epoch.step,
            "selector": dict(self._selector or {}) if self.rank == 0 else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved; on every rank, with rank 0's state, before `epochs()`.

        Raises:
            ValueError: the state is of a newer version, of other data or settings, or another rank's; with what
                differs.
            RuntimeError: `epochs()` has begun.
        """
        if self._opened:
            raise UsageError("load_state_dict() comes before `for epoch in shard.epochs()`")
        if "about" not in state or "selector" not in state:
            raise ConfigError("this is no state of a shard: give load_state_dict what state_dict() returned")
        if state.get("schema", 0) > STATE_SCHEMA:
            raise ConfigError(f"state of schema {state['schema']}, this version reads up to {STATE_SCHEMA}: upgrade")
        theirs = dict(state["about"])
        changed = [
            f"{name} {theirs.get(name)!r} → {own!r}"
            for name, own in self._terms.about.items()
            if theirs.get(name) != own
        ]
        if changed:
            raise ConfigError(
                f"the state is of another run ({'; '.join(changed)}): start without it, or change it back"
            )
        if not state["selector"]:
            raise ConfigError("the state holds no scores, it was saved on another rank than 0: load rank 0's")
        self._epoch, self._resume_step, self._selector = int(state["epoch"]), int(state["step"]), state["selector"]
