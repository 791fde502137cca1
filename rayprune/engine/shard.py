"""One rank's view of a pruned data set, inside a training loop of the user's own.

    shard = rayprune.get_dataset_shard("train")
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)

Every rank must take the same batches, as in any data-parallel loop: rank r's batch is its share of one global batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rayprune.engine.client import ScoreClient
from rayprune.engine.loop_actor import LoopTerms, Moment
from rayprune.engine.protocol import PlanHeader, Turn
from rayprune.engine.recorder import Recorder
from rayprune.engine.stream import Batch, Transport, plan_batches
from rayprune.engine.torch_batches import BatchForm, Collate, formed
from rayprune.nn.weighing import losses_per_sample, signals_per_sample, weighted_mean

logger = logging.getLogger(__name__)

STATE_SCHEMA = 1
_POLL_S, _WARN_S = 0.02, 30.0


class Shard:
    """One rank's share of every epoch of a pruned data set.

    Args:
        scores: the LoopActor.
        transport: how rows come.
        terms: what all ranks must know.
        rank, world_size: this worker.
        generation: this attempt's number, the same on every rank.
        device: where batches and losses live unless a loop says otherwise; None for the host.
    """

    def __init__(
        self,
        scores: ScoreClient,
        transport: Transport,
        terms: LoopTerms,
        rank: int,
        world_size: int,
        generation: int,
        device: torch.device | None,
    ) -> None:
        if terms.batch_size % world_size:
            raise ValueError(
                f"batch_size {terms.batch_size} does not divide by {world_size} workers: give prune(batch_size=) a "
                "multiple, it is the global batch"
            )
        self.rank, self.world_size, self.device = rank, world_size, device
        self._scores, self._transport, self._terms, self._generation = scores, transport, terms, generation
        self._recorder = Recorder(scores, generation, rank, terms.signals)
        self._epoch, self._base_step = 0, 0
        self._state: Mapping[str, Tensor] | None = None
        self._opened = False
        self._current: Epoch | None = None

    @property
    def num_epochs(self) -> int:
        """The epochs of the whole run."""
        return self._terms.num_epochs

    def epochs(self) -> Iterator[Epoch]:
        """Yield the epochs that are left; each is closed, and the next one's samples chosen, when its body ends.

        Raises:
            RuntimeError: called a second time.
        """
        if self._opened:
            raise RuntimeError("epochs() can be iterated once: get a new shard for another pass")
        self._open()
        while self._epoch < self.num_epochs:
            self._current = Epoch(self, self._epoch, self._base_step)
            yield self._current
            self._close()

    def _open(self) -> None:
        self._opened = True
        if self.rank == 0 and self._epoch < self.num_epochs:
            state = None if self._state is None else {name: tensor.numpy() for name, tensor in self._state.items()}
            self._scores.call("restore", self._generation, self._epoch, state)
        self._state = None
        while self._scores.call("generation") < self._generation and self._epoch < self.num_epochs:
            time.sleep(_POLL_S)  # rank 0 restores first
        self._recorder.start_epoch(self._epoch, self._base_step)

    def _close(self) -> None:
        """Close the running epoch, unless `state_dict` has done so."""
        epoch = self._current
        if epoch is None:
            return
        epoch._check_weighed()
        self._meet("close", epoch._step)
        self._current = None
        self._epoch, self._base_step = self._epoch + 1, 0
        self._recorder.start_epoch(self._epoch)

    def scores(self) -> dict[str, Any]:
        """Return the method's scores, `last_visit` and `times_pruned`, name → (N,); NaN where never visited."""
        found: dict[str, Any] = self._scores.call("scores")
        return found

    def sweep(self, score: Callable[[Any], Any], **form: Any) -> int:
        """Score the samples that the method asks to see without training, such as those left out; no gradients.

        Call it in an epoch's body, after its batches. Nothing happens where the method asks for none.

        Args:
            score: called with each batch; returns the losses (B,), or a mapping with `losses` and, where the method
                needs them, `logits`, `targets`, `embeddings`.
            **form: as for `iter_torch_batches`.

        Returns:
            How many samples of this rank were scored.
        """
        if self._current is None:
            raise RuntimeError("sweep belongs into the body of `for epoch in shard.epochs()`, before state_dict()")
        return self._current._sweep(score, **form)

    def state_dict(self) -> dict[str, Any]:
        """Return position, scores and current selection, to be saved with the model.

        Collective: every rank calls it at the same step (as `ray.train.report`). Inside an epoch it is the state
        before the next batch; after the last batch it closes the epoch. Rank 0's holds the scores, the others' the
        position: save rank 0's. It holds tensors, numbers and text only, so `torch.load(weights_only=True)` reads it.
        """
        if not self._opened:
            raise RuntimeError("state_dict() has something to say once `for epoch in shard.epochs()` has begun")
        epoch = self._current
        if epoch is not None and epoch._finished:
            self._close()
            epoch = None
        elif epoch is not None:
            self._meet("snapshot", epoch._step)
        selector: dict[str, Tensor] = {}
        if self.rank == 0:
            selector = {
                name: torch.from_numpy(array.copy()) for name, array in self._scores.call("answer").state.items()
            }
        return {
            "schema": STATE_SCHEMA,
            "about": dict(self._terms.about),
            "epoch": self._epoch,
            "step": 0 if epoch is None else epoch._step,
            "selector": selector,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved; on every rank, with rank 0's state, before `epochs()`.

        Raises:
            ValueError: the state is of a newer version, of other data or settings, or another rank's; with what
                differs.
            RuntimeError: `epochs()` has begun.
        """
        if self._opened:
            raise RuntimeError("load_state_dict() comes before `for epoch in shard.epochs()`")
        if state.get("schema", 0) > STATE_SCHEMA:
            raise ValueError(f"state of schema {state['schema']}, this version reads up to {STATE_SCHEMA}: upgrade")
        theirs = dict(state["about"])
        changed = [
            f"{name} {theirs.get(name)!r} → {own!r}"
            for name, own in self._terms.about.items()
            if theirs.get(name) != own
        ]
        if changed:
            raise ValueError(f"the state is of another run ({'; '.join(changed)}): start without it, or change it back")
        if not state["selector"]:
            raise ValueError("the state holds no scores, it was saved on another rank than 0: load rank 0's")
        self._epoch, self._base_step, self._state = int(state["epoch"]), int(state["step"]), state["selector"]

    def _meet(self, moment: Moment, step: int) -> None:
        """Flush, and wait until every rank has."""
        turn, began, warned = (self._epoch, self._base_step), time.monotonic(), False
        count = self._recorder.flush()
        while True:
            said = self._scores.call("arrive", self._generation, turn, self.rank, count, self.world_size, moment, step)
            if said == "done":
                return
            if said == "again":
                count = self._recorder.flush()
            elif not warned and time.monotonic() - began > _WARN_S:
                warned = True
                missing = sorted(set(range(self.world_size)) - set(self._scores.call("waiting")))
                logger.warning(
                    "rank %d waits since %.0f s for ranks %s to end the epoch or call state_dict(): every rank must",
                    self.rank,
                    _WARN_S,
                    missing,
                )
            time.sleep(_POLL_S if said == "wait" else 0.0)


class Epoch:
    """One epoch of a Shard.

    Attributes:
        index: 0-based.
        num_steps: global batches in the whole epoch.
        start_step: the first one to be trained here; above 0 after a resume inside the epoch.
        num_kept, num_samples: of the selection.
        requested, realised: prune ratio asked for, and what it came to.
        lr_scale: what the method wants the learning rate multiplied by.
        plan_hash: of ids, weights and order.
    """

    def __init__(self, shard: Shard, index: int, start_step: int) -> None:
        self._shard, self.index, self.start_step = shard, index, start_step
        self._turn = Turn(index, "train", shard.world_size, start_step, start_step)
        header = self._announce(self._turn)
        self._header = header
        self.num_steps, self.num_kept, self.num_samples = header.num_steps, header.num_kept, header.num_samples
        self.requested, self.realised = header.requested, header.realised
        self.lr_scale, self.plan_hash = header.lr_scale, header.hash
        self._step, self._num_weighed = start_step, 0
        self._batch: Batch | None = None
        self._given: Any = None
        self._iterated = self._finished = False

    def _announce(self, turn: Turn) -> PlanHeader:
        shard = self._shard
        header: PlanHeader = shard._scores.call("announce", shard._generation, turn)
        return header

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
            dtypes: of the data's columns, or by name.
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
        self._iterated = True
        form = BatchForm(self._device(device), dtypes, collate_fn)
        for batch, given in formed(self._batches(self._turn, self._header), form, prefetch_batches):
            self._batch, self._given = batch, given
            self._step += 1
            self._finished = self._step == self.num_steps
            yield given
        self._finished = True

    def _device(self, device: torch.device | str | None) -> torch.device | None:
        if device == "auto":
            return self._shard.device
        return None if device is None else torch.device(device)

    def _batches(self, turn: Turn, header: PlanHeader) -> Iterator[Batch]:
        shard = self._shard
        size = shard._terms.batch_size
        return plan_batches(shard._scores, shard._generation, turn, header, shard.rank, size, shard._transport)

    def weigh(
        self,
        batch: Any,
        losses: Tensor,
        *,
        logits: Tensor | None = None,
        targets: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Record the losses and return the weighted mean, to be differentiated.

        It is Σ(weight · loss) ÷ B with the constant B of this worker's share, so that DDP's mean over the workers is
        the weighted mean over the global batch. With gradient accumulation, divide it as you would any mean loss.

        Args:
            batch: the batch that `iter_torch_batches` gave last.
            losses: (B,), or (B, T), (B, 1, …): then a sample's loss is the mean over the other axes.
            logits, targets, embeddings: for methods that need more than the loss; targets default to the batch's
                `label`. See `rayprune.nn.weighing.signals_per_sample`.
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
        self._record(current, losses_B, self._needed(batch, logits, targets, embeddings))
        self._batch = self._given = None
        self._num_weighed += 1
        weights_B = torch.from_numpy(current.weights.copy()).to(losses_B.device, non_blocking=True)
        return weighted_mean(losses_B, weights_B)

    def _needed(self, batch: Any, logits: Any, targets: Any, embeddings: Any) -> dict[str, Any]:
        if targets is None and isinstance(batch, Mapping) and isinstance(batch.get("label"), Tensor):
            targets = batch["label"]
        if targets is not None and logits is not None:
            targets = targets.to(logits.device)
        return {"logits": logits, "targets": targets, "embeddings": embeddings}

    def _record(self, batch: Batch, losses_B: Tensor, needed: Mapping[str, Any]) -> None:
        signals = signals_per_sample(self._shard._terms.signals, losses_B, **needed)
        self._shard._recorder.record(batch.ids, batch.real, signals)

    def _sweep(self, score: Callable[[Any], Any], **form: Any) -> int:
        if self._header.num_forward_only == 0:
            return 0
        turn = Turn(self.index, "forward", self._shard.world_size, 0, self.start_step)
        device = self._device(form.pop("device", "auto"))
        ahead = form.pop("prefetch_batches", 1)
        scored = 0
        with torch.no_grad():
            for batch, given in formed(self._batches(turn, self._announce(turn)), BatchForm(device, **form), ahead):
                said = score(given)
                told = dict(said) if isinstance(said, Mapping) else {"losses": said}
                losses_B = losses_per_sample(told.pop("losses"), batch.ids.size, told.pop("mask", None))
                needed = self._needed(given, told.get("logits"), told.get("targets"), told.get("embeddings"))
                self._record(batch, losses_B, needed)
                scored += int(batch.real.sum())
        return scored

    def _check_weighed(self) -> None:
        """Say so where a loop did not weigh what it was given: its scores are then those of an earlier epoch."""
        given = self._step - self.start_step
        if given > self._num_weighed and self._shard._terms.signals:
            logger.warning(
                "epoch %d: weigh was called for %d of %d batches; the method learns nothing of the others",
                self.index,
                self._num_weighed,
                given,
            )
        if given < len(self):
            logger.warning("epoch %d ended after %d of %d batches", self.index, given, len(self))
