"""One epoch of a Shard: its batches, and what a loop does with their losses.

Shapes: B rows of this worker's share of a global batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.engine.client import LoopClient
from rayprune.engine.loop_actor import LoopTerms
from rayprune.engine.protocol import PlanHeader
from rayprune.engine.session import ScoringSession
from rayprune.engine.stream import Batch, Transport
from rayprune.engine.torch_batches import BatchForm, Collate, formed
from rayprune.nn.weighing import losses_per_sample, signals_per_sample, weighted_mean

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
        self, session: ScoringSession[LoopClient], transport: Transport, terms: LoopTerms, device: torch.device | None
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
            raise RuntimeError(f"epoch {self.index} was iterated already: its samples are to be trained on once")
        form = BatchForm(self._device(device), dtypes, collate_fn)
        self._iterated = True
        for batch, given in formed(self._batches(self._header), form, prefetch_batches):
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
                batch's `label`, head is the last linear layer. See `rayprune.nn.weighing.signals_per_sample`.
            mask: of the losses' shape, 0 where a position does not count.

        Raises:
            ValueError: a scalar, another batch, a wrong shape, or something the method needs is missing.
        """
        current = self._batch
        if current is None or batch is not self._given:
            raise ValueError(
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
            raise RuntimeError(f"epoch {self.index} was swept already: its samples are to be scored once")
        self._swept = True
        header = self._session.announce("forward")
        device = self._device(form.pop("device", "auto"))
        ahead = form.pop("prefetch_batches", 1)
        scored, swept = 0, self._terms.sweep_signals
        self._session.recorder.start_sweep(swept)
        with torch.no_grad():
            for batch, given in formed(self._batches(header), BatchForm(device, **form), ahead):
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
            raise RuntimeError("state_dict() comes after weigh: the state would lack the batch that was given last")

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
