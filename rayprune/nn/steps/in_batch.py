"""The step that trains on some rows of every batch: a forward pass scores the candidates, and a method picks.

The decision is made once for the global batch. All ranks gather the signals of all rows, in the order of the global
batch, and each of them makes the same decision (`core.bases.in_batch`). Then each rank trains on its own picked
rows, in a second forward pass and a backward pass. A rank without picked rows goes along with one row of weight 0, so
that DDP's collective operations match.

The loss is the mean over the M picked rows of all ranks of w·l, with the method's weight times the plan's. The last
batch of an epoch has padding, which is never a candidate; its loss is scaled by its share of real rows, as in the plain
step. So a method that picks every row takes the plain step.

Statistics of batch normalization move once in a step, in the second pass, by the picked rows of a rank; DDP keeps those
of rank 0. Networks without batch normalization train the same for any number of ranks, up to rounding.

A forward pass is waited for in every step, because the host decides.

Shapes: N samples, B rows of this worker's part of the batch, W workers, R = W·B rows, M picked rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rayprune.core.bases.in_batch import Candidates, InBatchMethod, StepContext
from rayprune.core.table import Ids
from rayprune.errors import ConfigError
from rayprune.nn.collectives import Ranks
from rayprune.nn.device import Copies
from rayprune.nn.steps.plain import BatchPlace, PlainStep, RowCounts
from rayprune.nn.steps.registry import register_step

# The step's own signal: 1 for a row that was trained on, else 0.
PICKED = "picked"


@register_step("in_batch")
class InBatchStep(PlainStep):
    """Take one optimization step on the rows of a batch that a method picks.

    Args:
        model, optimizer, **recipe: as for PlainStep.
        method: picks.
        num_epochs: E.
        num_samples: N.
        columns: name → (N,) float32, the method's columns from files.
        seed: of the run.
        permuted: the method gets the signals of other rows, for a control.
        signals: names that the step returns besides loss, correct and `picked`.

    Raises:
        ConfigError: a column of another length.
    """

    options_class = None
    run_facts = ("seed", "num_epochs", "num_samples")
    takes_place = True
    compilable = False  # the number of rows changes from rank to rank and from step to step

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        method: InBatchMethod,
        num_epochs: int,
        num_samples: int,
        columns: Mapping[str, NDArray[np.float32]] | None = None,
        seed: int = 0,
        permuted: bool = False,
        signals: tuple[str, ...] = (),
        **recipe: Any,
    ) -> None:
        states = method.state_columns(num_samples)
        # A method with a state updates it in plain steps, too.
        names = (*signals, *method.batch_signals) if states else signals
        super().__init__(model, optimizer, signals=tuple(name for name in names if name != PICKED), **recipe)
        self._method, self._permuted = method, permuted
        self._run = {"num_epochs": num_epochs, "num_samples": num_samples, "seed": seed}
        self._states = {name: np.full(num_samples, value, dtype=np.float32) for name, value in states.items()}
        self._columns = {**(columns or {}), **self._states}
        for name, column in self._columns.items():
            if column.shape != (num_samples,):
                raise ConfigError(f"column {name!r} of shape {column.shape} does not fit {num_samples} samples")
        self.scored_signals = tuple(dict.fromkeys((*self._signals, *method.batch_signals)))
        self._ranks = Ranks(model)
        # Batch normalization refuses to train on a single row of features.
        self._least_rows = 2 if any(isinstance(module, _BatchNorm) for module in self._network.modules()) else 1
        self._copies = Copies(next(self._module.parameters()).device)
        self._counts: RowCounts | None = None

    def __call__(
        self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor, place: BatchPlace | None = None
    ) -> dict[str, Tensor]:
        """Score the rows, train on those that the method picks, and update the model once.

        Args:
            inputs: (B, …).
            targets_B: (B,) int64.
            weights_B: (B,) the plan's weights, 0 for padding.
            place: of the batch in the run.

        Returns:
            Signal name → (B, …) float32, detached, on the device: of all rows, from the pass that scores them (0 for
            padding), and `picked`. In steps that do not pick, from the training pass.
        """
        if place is None:
            raise TypeError("the step in_batch needs the batch's place in the run: pass place=BatchPlace(…)")
        context = StepContext(
            epoch=place.epoch, step=place.step, num_steps=place.num_steps, facts=place.facts, **self._run
        )
        if not self._method.picks(context):
            self._counts = None
            signals = super().__call__(inputs, targets_B, weights_B)
            if self._states:
                rows = self._gather(signals, self._method.batch_signals, targets_B, weights_B, place.ids)
                self._update_states(self._candidates(rows, context))
            return {**signals, PICKED: (weights_B > 0).float()}
        signals = self._score(inputs, targets_B, place.real)
        rows = self._gather(signals, self._method.batch_signals, targets_B, weights_B, place.ids)
        candidates = self._candidates(rows, context)
        picked_M, weights_M = candidates.pick(self._method, permuted=self._permuted)
        self._update_states(candidates)
        own = slice(self._ranks.rank * len(targets_B), (self._ranks.rank + 1) * len(targets_B))
        is_own = (picked_M >= own.start) & (picked_M < own.stop)
        trained = picked_M[is_own] - own.start
        fillers = np.empty(0, dtype=np.int64)
        if picked_M.size:  # else all losses are NaN, on every rank
            weights = weights_M[is_own] * rows["weight"][picked_M[is_own]]
            fillers = self._fillers(trained, rows["loss"][own])
            # The mean over the picked rows; a padded batch counts by its share of real rows.
            divisor = picked_M.size * rows["weight"].size / np.count_nonzero(rows["weight"]) / self._ranks.number
            self._train(inputs, targets_B, np.concatenate([trained, fillers]), weights, float(divisor))
        self._counts = RowCounts(trained.size, fillers.size, int(np.count_nonzero(place.real)))
        picked_B = np.zeros(len(targets_B), dtype=np.float32)
        picked_B[trained] = 1.0
        (picked,) = self._copies(torch.from_numpy(picked_B))
        return {**{name: signals[name] for name in self._signals}, PICKED: picked}

    def row_counts(self, num_real: int, num_rows: int) -> RowCounts:
        return super().row_counts(num_real, num_rows) if self._counts is None else self._counts

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state columns, if it has any."""
        columns = {name: torch.from_numpy(column) for name, column in self._states.items()}
        return {"columns": columns} if columns else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state, {"columns"} if self._states else set())
        for name, column in self._states.items():
            column[:] = state["columns"][name].cpu().numpy()

    @torch.no_grad()
    def _score(self, inputs: Tensor, targets_B: Tensor, real_B: NDArray[np.bool_]) -> dict[str, Tensor]:
        """Return the signals of this rank's real rows, (B, …) with 0 for padding."""
        in_eval_mode = self._method.candidates_in_eval_mode
        self._set_mode(training=not in_eval_mode)
        if in_eval_mode:
            # Ranks have running statistics of their own until DDP's next training pass; a resumed run has rank 0's.
            self._ranks.broadcast(buffer for buffer in self._module.buffers() if buffer.is_floating_point())
        scored = np.flatnonzero(real_B)
        least = 1 if in_eval_mode else self._least_rows
        if scored.size < least:
            scored = np.resize(np.concatenate([scored, np.flatnonzero(~real_B)]), least)
        index = None
        if scored.size != real_B.size:
            (index,) = self._copies(torch.from_numpy(scored))
            inputs, targets_B = _rows_of(inputs, index), targets_B[index]
        with contextlib.ExitStack() as stack:
            if not in_eval_mode:
                stack.enter_context(self._unchanged_buffers())
            signals = self._forward_only(inputs, targets_B, smoothed=True, signals=self.scored_signals)
        if index is None:
            return signals
        return {
            name: values.new_zeros((real_B.size, *values.shape[1:])).index_copy_(0, index, values)
            for name, values in signals.items()
        }

    def _gather(
        self, signals: Mapping[str, Tensor], names: tuple[str, ...], targets_B: Tensor, weights_B: Tensor, ids_B: Tensor
    ) -> dict[str, NDArray[Any]]:
        """Return signals, `loss`, `label`, `weight` and `id` of all ranks' rows on the host, name → (R, …)."""
        tensors = {name: signals[name] for name in dict.fromkeys((*names, "loss"))}
        tensors |= {"label": targets_B, "weight": weights_B.float(), "id": ids_B}
        parts = [tensor.reshape(len(ids_B), -1).contiguous().view(torch.uint8) for tensor in tensors.values()]
        # One operation and one copy to the host, whatever the number of signals.
        packed = self._ranks.gather(torch.cat(parts, dim=1)).cpu().numpy()
        stops = np.cumsum([part.shape[1] for part in parts])
        rows = {}
        for (name, tensor), columns in zip(tensors.items(), np.split(packed, stops[:-1], axis=1), strict=True):
            dtype = np.int64 if tensor.dtype == torch.int64 else np.float32
            rows[name] = np.ascontiguousarray(columns).view(dtype).reshape(len(packed), *tensor.shape[1:])
        return rows

    def _candidates(self, rows: Mapping[str, NDArray[Any]], context: StepContext) -> Candidates:
        columns = {name: column[rows["id"]] for name, column in self._columns.items()}
        signals = {name: rows[name] for name in self._method.batch_signals}
        real = (rows["weight"] > 0) & np.isfinite(rows["loss"])
        return Candidates(signals, context.with_rows(rows["id"], rows["label"], columns), real)

    def _update_states(self, candidates: Candidates) -> None:
        """Update the state columns, on every rank for the rows of all ranks."""
        for name, values in candidates.update(self._method).items():
            self._states[name][candidates.context.ids] = values

    def _fillers(self, trained: Ids, losses_B: NDArray[np.float32]) -> Ids:
        """Return rows to go along with weight 0, so that this rank's network has the rows that it needs."""
        missing = max(0, self._least_rows - trained.size)
        others = np.setdiff1d(np.arange(losses_B.size), trained)
        # A NaN loss would make the gradient NaN, whatever its weight.
        others = others[np.argsort(~np.isfinite(losses_B[others]), kind="stable")]
        return np.resize(np.concatenate([others, trained]), missing)

    def _train(
        self, inputs: Tensor, targets_B: Tensor, rows: Ids, weights: NDArray[np.float32], divisor: float
    ) -> None:
        """Take the optimizer's step on Σ(w·l)/divisor; the last rows, which have no weight, count 0."""
        weights = np.concatenate([weights, np.zeros(rows.size - weights.size, dtype=np.float32)])
        self._set_mode(training=True)
        self.optimizer.zero_grad(set_to_none=True)
        index, weights_of_rows = self._copies(torch.from_numpy(rows), torch.from_numpy(weights))
        num_parts = max(1, min(self._accumulate, rows.size // self._least_rows))
        parts = zip(index.tensor_split(num_parts), weights_of_rows.tensor_split(num_parts), strict=True)
        for number, (part, part_weights) in enumerate(parts, start=1):
            is_last = number == num_parts
            self._pass(_rows_of(inputs, part), targets_B[part], part_weights, divisor, synchronize=is_last)
        self._update()

    @contextlib.contextmanager
    def _unchanged_buffers(self) -> Iterator[None]:
        """Restore the network's buffers, such as running statistics, after a pass in train mode."""
        buffers = list(self._network.buffers())
        saved = [buffer.clone() for buffer in buffers]
        yield
        for buffer, before in zip(buffers, saved, strict=True):
            buffer.copy_(before)

    def _compute_signals(
        self,
        names: tuple[str, ...],
        logits: Tensor,
        targets_B: Tensor,
        losses_B: Tensor,
        part: str = "model",
        embeddings_BD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the signals of a pass; a pass that does not train picks nothing."""
        others = tuple(name for name in names if name != PICKED)
        signals = super()._compute_signals(others, logits, targets_B, losses_B, part, embeddings_BD)
        return signals if others == names else {**signals, PICKED: torch.zeros_like(signals["loss"])}


def _rows_of(inputs: Tensor, index: Tensor) -> Tensor:
    """Return rows of the inputs in the memory layout of the inputs."""
    rows = inputs.index_select(0, index)
    is_channels_last = inputs.ndim == 4 and inputs.is_contiguous(memory_format=torch.channels_last)
    return rows.contiguous(memory_format=torch.channels_last) if is_channels_last else rows
