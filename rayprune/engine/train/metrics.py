"""What an epoch's metrics are made of: sums over rows that really passed through the model, added up on the device.

Shapes: B rows of a batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.engine.data.batch import PlacedRows
from rayprune.engine.storage.costs import PriorCost
from rayprune.nn.steps import TrainStep

# Places in the sums: loss, correct, rows with a finite loss, real rows, padding rows, bytes read (exact up to 2^53).
LOSS, CORRECT, FINITE, REAL, PADDED, BYTES = range(6)
_ON_DEVICE = 3  # the first ones; the host knows the others without asking


class MetricSums:
    """Sums of a phase: those of losses are added up on the device, without waiting for it, counts on the host.

    Args:
        device: where the signals are.
        num_classes: C classes to count the rows of, 0 for none.
        num_exits: K exits to sum over where there are several.
        stored: `total` of a checkpoint inside the epoch; places that an older one does not have are 0.
    """

    def __init__(
        self, device: torch.device, num_classes: int = 0, num_exits: int = 1, stored: Sequence[float] = ()
    ) -> None:
        size = 6 + 2 * num_classes + (3 * num_exits if num_exits > 1 else 0)
        values = [*stored, *[0.0] * (size - len(stored))]
        self._counts = values[_ON_DEVICE:6]
        self._sums = torch.tensor([*values[:_ON_DEVICE], *values[6:]], dtype=torch.float64, device=device)
        self._num_classes = num_classes

    def add(
        self,
        signals: Mapping[str, Tensor],
        rows: PlacedRows,
        real: NDArray[np.bool_],
        num_bytes: int,
        labels_B: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            signals: per sample; `loss` and `correct` count, or `metric_loss` and `metric_correct` where there are.
            rows: the batch's rows on the device.
            real: (B,) the same marks on the host.
            num_bytes: read from storage for the batch.
            labels_B: int64 in [0, C), read where classes (and exits) are counted.
        """
        num_real = int(np.count_nonzero(real))
        for place, more in enumerate((num_real, real.size - num_real, num_bytes)):
            self._counts[place] += more
        losses_B, right_B = (signals.get(f"metric_{name}", signals[name]) for name in ("loss", "correct"))
        # Left out by selection, not by a product (0 · NaN is NaN): padding, and the few NaN losses that are tolerated.
        counted_B = losses_B.abs() < math.inf
        if num_real < real.size:
            counted_B, right_B = counted_B & rows.real, right_B * rows.real
        told = torch.stack([losses_B.where(counted_B, 0.0), right_B, counted_B.to(losses_B.dtype)])
        self._sums[:_ON_DEVICE] += told.sum(1, dtype=torch.float64)
        if self._sums.numel() == _ON_DEVICE or labels_B is None:
            return
        end = _ON_DEVICE + 2 * self._num_classes
        correct, every = self._sums[_ON_DEVICE:end].view(2, -1)
        correct.index_add_(0, labels_B, right_B.double())
        every.index_add_(0, labels_B, rows.real.double())
        if end < self._sums.numel():
            self._sums[end:] += _exit_sums(signals, rows.real)

    def total(self, world_size: int) -> Tensor:
        """Return the sums over all ranks, (6 + 2C + 3K,) float64 on the device, and wait for it: a phase's seconds
        are then its own. The places above come first, then each class's correct rows, then its real rows; then, of
        several exits, each one's loss, its rows with a finite one, its correct rows.
        """
        counts = torch.tensor(self._counts, dtype=torch.float64, device=self._sums.device)
        total = torch.cat([self._sums[:_ON_DEVICE], counts, self._sums[_ON_DEVICE:]])
        if world_size > 1:
            torch.distributed.all_reduce(total)
        if total.device.type == "cuda":
            torch.cuda.synchronize(total.device)
        return total


def _exit_sums(signals: Mapping[str, Tensor], real_B: Tensor) -> Tensor:
    """Return a batch's (3K,) float64 sums over its exits."""
    losses_BK = signals["exit_loss"].double()
    counted_BK = real_B[:, None] & losses_BK.isfinite()
    correct_BK = signals["exit_correct"].double() * real_B[:, None]
    return torch.cat([torch.where(counted_BK, losses_BK, 0.0).sum(0), counted_BK.double().sum(0), correct_BK.sum(0)])


def means(sums: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy over real rows, unweighted; NaN where no loss was finite."""
    finite = float(sums[FINITE])
    loss = float(sums[LOSS]) / finite if finite else float("nan")
    return loss, float(sums[CORRECT]) / max(float(sums[REAL]), 1.0)


def validated(sums: Tensor | None, num_exits: int = 1) -> dict[str, Any]:
    """Return what a validation found, for metrics.jsonl; None for each name where there was none.

    `val_class_accuracy` has C entries, None for a class without a validation sample. A network with K > 1 exits has
    `val_exit_loss` and `val_exit_accuracy` besides, K entries each; all else is of its last exit.
    """
    exits = ("val_exit_loss", "val_exit_accuracy") if num_exits > 1 else ()
    if sums is None:
        return dict.fromkeys(("val_loss", "val_accuracy", "val_class_accuracy", *exits))
    loss, accuracy = means(sums)
    end = sums.numel() - (3 * num_exits if exits else 0)
    correct, real = sums[6:end].reshape(2, -1).tolist()
    classes = [round(right / rows, 6) if rows else None for right, rows in zip(correct, real, strict=True)]
    found: dict[str, Any] = {"val_loss": loss, "val_accuracy": accuracy, "val_class_accuracy": classes}
    if exits:
        losses, finite, right_K = sums[end:].reshape(3, -1)
        found["val_exit_loss"] = (losses / finite).tolist()  # 0 / 0 is NaN: no finite loss at all
        found["val_exit_accuracy"] = (right_K / sums[REAL].clamp(min=1.0)).tolist()
    return found


def compute(counts: Mapping[str, int], before: PriorCost, step: TrainStep, part: str) -> float:
    """Return what a run has cost so far, in samples trained: a forward pass alone is a third of one.

    Args:
        counts: cumulative, what was spent before the run included.
        before: that.
        step: knows what a sample costs it, in training and through `part` alone.
        part: which forward-only passes went through.
    """
    rows = counts["samples_trained"] + counts["samples_padded"] - before.samples_trained - before.samples_padded
    forwarded = counts["samples_forwarded"] - before.samples_forwarded
    learned = (counts["samples_meta"] - before.samples_meta) * step.meta_cost
    return round(before.compute + rows * step.train_cost + learned + forwarded * step.relative_cost(part) / 3, 1)
