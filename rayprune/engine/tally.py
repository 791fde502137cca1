"""What an epoch's metrics are made of: sums over rows that really passed through the model, added up on the device.

Shapes: B rows of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rayprune.engine.setup import Before
from rayprune.nn.steps import TrainStep

# Places in the sums: loss, correct, rows with a finite loss, real rows, padding rows, bytes read (exact up to 2^53).
LOSS, CORRECT, FINITE, REAL, PADDED, BYTES = range(6)


def new_sums(device: torch.device, num_classes: int = 0) -> Tensor:
    """Return (6 + 2C,) float64 zeros: the places above, then each class's correct rows, then its real rows."""
    return torch.zeros(6 + 2 * num_classes, dtype=torch.float64, device=device)


def resumed_sums(stored: list[float], device: torch.device) -> Tensor:
    """Return the sums of a checkpoint inside an epoch; places that an older one does not have are 0."""
    sums = new_sums(device)
    sums[: len(stored)] = torch.tensor(stored, dtype=sums.dtype, device=device)
    return sums


def add_batch(
    sums: Tensor, signals: dict[str, Tensor], real_B: Tensor, num_bytes: int, labels_B: Tensor | None = None
) -> None:
    """Add a batch to the sums on the device, without waiting for it.

    Args:
        sums: changed in place.
        signals: per sample; `loss` and `correct` are counted.
        real_B: False for padding.
        num_bytes: read from storage for the batch.
        labels_B: int64 in [0, C), read where the sums have places for classes.
    """
    real = real_B.to(torch.float64)
    count = real.sum()
    # Left out by selection, not by a product (0 · NaN is NaN): padding, and the few NaN losses that a run tolerates.
    counted_B = real_B & signals["loss"].isfinite()
    loss = torch.where(counted_B, signals["loss"].double(), 0.0).sum()
    correct_B = signals["correct"].double() * real
    read = torch.full_like(count, num_bytes)
    sums[:6] += torch.stack([loss, correct_B.sum(), counted_B.sum().double(), count, real_B.numel() - count, read])
    if (num_classes := (sums.numel() - 6) // 2) and labels_B is not None:
        sums[6:].index_add_(0, labels_B, correct_B)
        sums[6 + num_classes :].index_add_(0, labels_B, real)


def means(sums: Tensor) -> tuple[float, float]:
    """Return the mean loss and the accuracy over real rows, unweighted; NaN where no loss was finite."""
    finite = float(sums[FINITE])
    loss = float(sums[LOSS]) / finite if finite else float("nan")
    return loss, float(sums[CORRECT]) / max(float(sums[REAL]), 1.0)


def validated(sums: Tensor | None) -> dict[str, Any]:
    """Return what a validation found, for metrics.jsonl; None three times where there was none.

    `val_class_accuracy` has C entries, None for a class without a validation sample.
    """
    if sums is None:
        return dict.fromkeys(("val_loss", "val_accuracy", "val_class_accuracy"))
    loss, accuracy = means(sums)
    correct, real = sums[6:].reshape(2, -1).tolist()
    classes = [round(right / rows, 6) if rows else None for right, rows in zip(correct, real, strict=True)]
    return {"val_loss": loss, "val_accuracy": accuracy, "val_class_accuracy": classes}


def compute(counts: Mapping[str, int], before: Before, step: TrainStep, part: str) -> float:
    """Return what a run has cost so far, in samples trained: a forward pass alone is a third of one.

    Args:
        counts: cumulative, what was spent before the run included.
        before: that.
        step: knows what a sample costs it, in training and through `part` alone.
        part: which forward-only passes went through.
    """
    rows = counts["samples_trained"] + counts["samples_padded"] - before.samples_trained - before.samples_padded
    forwarded = counts["samples_forwarded"] - before.samples_forwarded
    return round(before.compute + rows * step.train_cost + forwarded * step.relative_cost(part) / 3, 1)
