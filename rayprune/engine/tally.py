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


def new_sums(device: torch.device, num_classes: int = 0, num_exits: int = 1) -> Tensor:
    """Return (6 + 2C,) float64 zeros: the places above, then each class's correct rows, then its real rows.

    With K > 1 exits there are 3K more: each exit's loss, its rows with a finite one, its correct rows.
    """
    exits = 3 * num_exits if num_exits > 1 else 0
    return torch.zeros(6 + 2 * num_classes + exits, dtype=torch.float64, device=device)


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
        signals: per sample; `loss` and `correct` are counted, or `metric_loss` and `metric_correct` where there are.
        real_B: False for padding.
        num_bytes: read from storage for the batch.
        labels_B: int64 in [0, C), read where the sums have places for classes (and exits).
    """
    real = real_B.to(torch.float64)
    count = real.sum()
    losses_B, right_B = (signals.get(f"metric_{name}", signals[name]) for name in ("loss", "correct"))
    # Left out by selection, not by a product (0 · NaN is NaN): padding, and the few NaN losses that a run tolerates.
    counted_B = real_B & losses_B.isfinite()
    loss = torch.where(counted_B, losses_B.double(), 0.0).sum()
    correct_B = right_B.double() * real
    read = torch.full_like(count, num_bytes)
    sums[:6] += torch.stack([loss, correct_B.sum(), counted_B.sum().double(), count, real_B.numel() - count, read])
    if sums.numel() == 6 or labels_B is None:
        return
    exits = _exit_sums(signals, real_B)
    by_class = sums[6 : sums.numel() - exits.numel()]
    by_class.index_add_(0, labels_B, correct_B)
    by_class[by_class.numel() // 2 :].index_add_(0, labels_B, real)
    sums[sums.numel() - exits.numel() :] += exits.to(sums.device)


def over_ranks(sums: Tensor, world_size: int) -> Tensor:
    """Add up the ranks' sums, in place, and wait for the device: a phase's seconds are then its own."""
    if world_size > 1:
        torch.distributed.all_reduce(sums)
    if sums.device.type == "cuda":
        torch.cuda.synchronize(sums.device)
    return sums


def gathered(count: int, rank: int, world_size: int, device: torch.device) -> list[int]:
    """Return every rank's count."""
    if world_size == 1:
        return [count]
    counts = torch.zeros(world_size, dtype=torch.int64, device=device)
    counts[rank] = count
    torch.distributed.all_reduce(counts)
    every: list[int] = counts.tolist()
    return every


def _exit_sums(signals: dict[str, Tensor], real_B: Tensor) -> Tensor:
    """Return a batch's (3K,) float64 sums over its exits; none of a network with one."""
    if "exit_loss" not in signals:
        return torch.zeros(0, dtype=torch.float64)
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
    learned = (counts["samples_meta"] - before.samples_meta) * step.meta_cost
    return round(before.compute + rows * step.train_cost + learned + forwarded * step.relative_cost(part) / 3, 1)
