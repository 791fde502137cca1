"""An epoch's metrics, from sums over the rows that passed through the model.

Shapes: B rows of a batch, C classes, K exits.
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
from rayprune.nn.steps import RowCounts, TrainStep

# Entries of the sums: loss, correct, rows with a finite loss, real rows, rows of weight 0, bytes read, rows trained on,
# and rows that a training step scored by a forward pass (exact up to 2^53).
LOSS, CORRECT, FINITE, REAL, PADDED, BYTES, TRAINED, SCORED = range(8)
NUM_ENTRIES = 8
_NUM_ON_DEVICE = 3  # the first entries; the host counts the others


class MetricSums:
    """The sums of a pass: of losses on the device, without waiting for it, and of counts on the host.

    Args:
        device: where the signals are.
        num_classes: C, to count rows per class; 0 to count none.
        num_exits: K, to sum per exit if K > 1.
        stored: the `total` of a checkpoint inside the epoch.
    """

    def __init__(
        self, device: torch.device, num_classes: int = 0, num_exits: int = 1, stored: Sequence[float] = ()
    ) -> None:
        size = NUM_ENTRIES + 2 * num_classes + (3 * num_exits if num_exits > 1 else 0)
        values = [*stored, *[0.0] * (size - len(stored))]
        self._counts = values[_NUM_ON_DEVICE:NUM_ENTRIES]
        on_device = [*values[:_NUM_ON_DEVICE], *values[NUM_ENTRIES:]]
        self._sums = torch.tensor(on_device, dtype=torch.float64, device=device)
        self._num_classes = num_classes

    def add(
        self,
        signals: Mapping[str, Tensor],
        rows: PlacedRows,
        real: NDArray[np.bool_],
        num_bytes: int,
        labels_B: Tensor | None = None,
        counts: RowCounts | None = None,
    ) -> None:
        """Add a batch.

        Args:
            signals: name → (B,); `metric_loss` and `metric_correct` replace `loss` and `correct` if present.
            rows: the batch's rows on the device.
            real: (B,) bool, `rows.real` on the host.
            num_bytes: bytes read from storage for the batch.
            labels_B: int64 in [0, C), needed to count per class and exit.
            counts: what a training step did with the rows; None: trained on the real ones, or none of them.
        """
        num_real = int(np.count_nonzero(real))
        counts = counts or RowCounts(num_real, real.size - num_real)
        numbers = (num_real, counts.padded, num_bytes, counts.trained, counts.forwarded)
        for entry, count in enumerate(numbers):
            self._counts[entry] += count
        losses_B, correct_B = (signals.get(f"metric_{name}", signals[name]) for name in ("loss", "correct"))
        # Padding and tolerated NaN losses are masked out, not multiplied by 0 (0 · NaN is NaN).
        counts_B = losses_B.abs() < math.inf
        if num_real < real.size:
            counts_B, correct_B = counts_B & rows.real, correct_B * rows.real
        batch = torch.stack([losses_B.where(counts_B, 0.0), correct_B, counts_B.to(losses_B.dtype)])
        self._sums[:_NUM_ON_DEVICE] += batch.sum(1, dtype=torch.float64)
        if self._sums.numel() == _NUM_ON_DEVICE or labels_B is None:
            return
        stop = _NUM_ON_DEVICE + 2 * self._num_classes
        class_correct, class_real = self._sums[_NUM_ON_DEVICE:stop].view(2, -1)
        class_correct.index_add_(0, labels_B, correct_B.double())
        class_real.index_add_(0, labels_B, rows.real.double())
        if stop < self._sums.numel():
            self._sums[stop:] += _exit_sums(signals, rows.real)

    def total(self, world_size: int) -> Tensor:
        """Return the sums over all ranks, (8 + 2C + 3K,) float64 on the device, and wait for the device.

        The eight entries come first, then correct rows and real rows per class; then, for several exits, loss, rows
        with a finite loss, and correct rows per exit. Waiting makes the seconds of a pass its own.
        """
        counts = torch.tensor(self._counts, dtype=torch.float64, device=self._sums.device)
        total = torch.cat([self._sums[:_NUM_ON_DEVICE], counts, self._sums[_NUM_ON_DEVICE:]])
        if world_size > 1:
            torch.distributed.all_reduce(total)
        if total.device.type == "cuda":
            torch.cuda.synchronize(total.device)
        return total


class CorrectRows:
    """Which of V validation samples the network classifies correctly.

    Args:
        num_samples: V.
        device: where the signals are.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self._correct_V = torch.zeros(num_samples, dtype=torch.int32, device=device)

    def add(self, signals: Mapping[str, Tensor], rows: PlacedRows) -> None:
        """Add a batch; `metric_correct` replaces `correct` if present. Padding is left out."""
        correct_B = signals.get("metric_correct", signals["correct"])
        self._correct_V.index_add_(0, rows.ids, (correct_B * rows.real).int())

    def total(self, world_size: int) -> NDArray[np.bool_]:
        """Return (V,) bool over all ranks."""
        if world_size > 1:
            torch.distributed.all_reduce(self._correct_V)
        return np.asarray(self._correct_V.cpu().numpy() > 0)


def _exit_sums(signals: Mapping[str, Tensor], real_B: Tensor) -> Tensor:
    """Return a batch's sums per exit, (3K,) float64."""
    losses_BK = signals["exit_loss"].double()
    counts_BK = real_B[:, None] & losses_BK.isfinite()
    correct_BK = signals["exit_correct"].double() * real_B[:, None]
    return torch.cat([torch.where(counts_BK, losses_BK, 0.0).sum(0), counts_BK.double().sum(0), correct_BK.sum(0)])


def means(sums: Tensor) -> tuple[float, float]:
    """Return the unweighted mean loss and accuracy over real rows; the loss is NaN if none was finite."""
    finite = float(sums[FINITE])
    loss = float(sums[LOSS]) / finite if finite else float("nan")
    return loss, float(sums[CORRECT]) / max(float(sums[REAL]), 1.0)


def validated(sums: Tensor | None, num_exits: int = 1) -> dict[str, Any]:
    """Return a validation's results for metrics.jsonl, all None without a validation.

    `val_class_accuracy` has C entries, None for a class without validation samples. A network with K > 1 exits also has
    `val_exit_loss` and `val_exit_accuracy`, K entries each; all other results are the last exit's.
    """
    exit_names = ("val_exit_loss", "val_exit_accuracy") if num_exits > 1 else ()
    if sums is None:
        return dict.fromkeys(("val_loss", "val_accuracy", "val_class_accuracy", *exit_names))
    loss, accuracy = means(sums)
    stop = sums.numel() - (3 * num_exits if exit_names else 0)
    correct_C, real_C = sums[NUM_ENTRIES:stop].reshape(2, -1).tolist()
    by_class = [round(correct / real, 6) if real else None for correct, real in zip(correct_C, real_C, strict=True)]
    results: dict[str, Any] = {"val_loss": loss, "val_accuracy": accuracy, "val_class_accuracy": by_class}
    if exit_names:
        losses_K, finite_K, correct_K = sums[stop:].reshape(3, -1)
        results["val_exit_loss"] = (losses_K / finite_K).tolist()  # NaN without a finite loss
        results["val_exit_accuracy"] = (correct_K / sums[REAL].clamp(min=1.0)).tolist()
    return results


def compute(counts: Mapping[str, int], prior_cost: PriorCost, step: TrainStep, part: str) -> float:
    """Return a run's compute so far, in training samples; a forward pass alone counts a third.

    Args:
        counts: the run's cumulative counts, `prior_cost` included.
        prior_cost: the cost of the run that scored the samples.
        step: knows the cost of a sample, in training and through `part`.
        part: the part of the network that forward-only passes use.
    """
    own = {name: count - prior_cost.counts[name] for name, count in counts.items()}
    trained = (own["samples_trained"] + own["samples_padded"]) * step.train_cost + own["samples_meta"] * step.meta_cost
    return round(prior_cost.compute + trained + own["samples_forwarded"] * step.relative_cost(part) / 3, 1)
