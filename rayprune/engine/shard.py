"""One rank's view of a pruned data set, inside a training loop of the user's own.

    shard = rayprune.get_dataset_shard("train")
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)

Every rank must take the same batches, as in any data-parallel loop: rank r's batch is its share of one global batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rayprune.engine.client import LoopClient
from rayprune.engine.epoch import Epoch
from rayprune.engine.loop_actor import LoopTerms
from rayprune.engine.protocol import Moment
from rayprune.engine.session import ScoringSession
from rayprune.engine.stream import Transport

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
        self, session: ScoringSession[LoopClient], transport: Transport, terms: LoopTerms, device: torch.device | None
    ) -> None:
        if terms.batch_size % session.world_size:
            raise ValueError(
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
            raise RuntimeError("epochs() can be iterated once: get a new shard for another pass")
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
            raise RuntimeError("sweep belongs into the body of `for epoch in shard.epochs()`, before state_dict()")
        return self._current.sweep(score, **form)

    def state_dict(self) -> dict[str, Any]:
        """Return position, scores and current selection, to be saved with the model.

        Collective: every rank calls it at the same step (as `ray.train.report`), after weigh. Inside an epoch it is the
        state before the next batch; after the batches (and the sweep, where there is one to make) it closes the epoch.
        Rank 0's holds the scores, the others' the position: save rank 0's. It holds tensors, numbers and text only, so
        that `torch.load(weights_only=True)` reads it.
        """
        if not self._opened:
            raise RuntimeError("state_dict() has something to say once `for epoch in shard.epochs()` has begun")
        epoch = self._current
        if epoch is not None:
            epoch.check_recorded()
        if epoch is not None and epoch.finished:
            self._close(with_state=True)
            epoch = None
        elif epoch is not None:
            if not self._transport.resumes_inside:
                raise RuntimeError(
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
            raise RuntimeError("load_state_dict() comes before `for epoch in shard.epochs()`")
        if "about" not in state or "selector" not in state:
            raise ValueError("this is no state of a shard: give load_state_dict what state_dict() returned")
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
        self._epoch, self._resume_step, self._selector = int(state["epoch"]), int(state["step"]), state["selector"]
