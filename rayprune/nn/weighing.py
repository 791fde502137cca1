"""One loss and one set of signals a sample, from the losses, logits and targets that a training loop has, of any task.

Shapes: B rows of this worker's share, C classes, P positions of a sample (tokens, pixels).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rayprune.core.objects import closest
from rayprune.nn.boundary import PairDistances
from rayprune.nn.signals import BOUNDARY_SIGNALS, SIGNALS, compute_signals

# What a loop gives directly; every other signal is derived from logits.
GIVEN = ("loss", "embedding")
# A sweep asks for the same layer batch after batch.
_LAST_HEAD = PairDistances()


def losses_per_sample(losses: Tensor, num_rows: int, mask: Tensor | None = None) -> Tensor:
    """Reduce losses to one a sample: the mean over every axis but the first.

    Args:
        losses: (B,), (B, T), (B, 1, …) or (B, H, W), differentiable.
        num_rows: B of the batch.
        mask: of the losses' shape, 0 where a position does not count (padding tokens), else its weight, such as 1;
            None counts all alike.

    Returns:
        (B,) of the losses' dtype; a sample whose mask is all 0 has loss 0.

    Raises:
        ValueError: a scalar, another number of rows, or a mask of another shape; with the cure.

    >>> losses_per_sample(torch.tensor([[1.0, 3.0], [5.0, 0.0]]), 2, torch.tensor([[1, 1], [1, 0]]))
    tensor([2., 5.])
    """
    if losses.ndim == 0:
        raise ValueError(
            "weigh needs one loss a sample and got a scalar: compute the loss with reduction='none' "
            "(cross_entropy(logits, labels, reduction='none')) and let weigh take the mean"
        )
    if losses.shape[0] != num_rows:
        raise ValueError(
            f"weigh got losses of shape {tuple(losses.shape)} for a batch of {num_rows}: the first axis must be the "
            "samples, in the batch's order"
        )
    if mask is not None:
        if mask.shape != losses.shape:
            raise ValueError(f"mask {tuple(mask.shape)} and losses {tuple(losses.shape)} must have one shape")
        counted = mask.to(losses.dtype).reshape(num_rows, -1)
        total_B = counted.sum(1)
        flat = losses.reshape(num_rows, -1)
        summed_B = (flat.where(counted != 0, torch.zeros_like(flat)) * counted).sum(1)
        return summed_B / total_B.where(total_B > 0, torch.ones_like(total_B))
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


def weighted_mean(losses_B: Tensor, weights_B: Tensor, batch_rows: int) -> Tensor:
    """Return Σ(w·l) ÷ batch_rows, a scalar.

    The divisor is a worker's share of every global batch, never Σw and never a short batch's length: DDP's mean over
    the ranks is then the weighted mean over the global batch, and every sample of an epoch counts by its weight alone.
    """
    losses_B = losses_B.float()  # a sum of many float16 losses overflows before it is divided
    # A NaN loss of a padding row stays out of the mean (its gradient, where logits are NaN, cannot be kept out).
    weighted = torch.where(weights_B > 0, losses_B * weights_B, torch.zeros_like(losses_B))
    return weighted.sum() / batch_rows


@torch.no_grad()
def signals_per_sample(
    names: Iterable[str],
    losses_B: Tensor,
    logits: Tensor | None = None,
    targets: Tensor | None = None,
    embeddings: Tensor | None = None,
    head: nn.Linear | Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the named signals of a batch.

    Args:
        names: `loss`, `embedding`, or keys of SIGNALS, which need logits and targets.
        losses_B: (B,) the loss of every sample.
        logits: (B, C) for classes, (B, C, …) for dense targets (B, …), (B, C) for multi-label targets (B, C).
        targets: int64 class indices (B,) or (B, …); floating (B, C) in [0, 1] for several labels a sample.
        embeddings: (B, d).
        head: the layer whose output the logits are, or its weight (C, D); signals of decision boundaries need it.

    Returns:
        name → (B,) or (B, d) float32, detached. Dense signals are means over the positions, those of several labels
        means over the labels.

    Raises:
        ValueError: something needed was not given, or its shape does not fit.
    """
    names = tuple(names)
    for name in names:
        if name not in GIVEN and name not in SIGNALS:
            raise ValueError(f"unknown signal {name!r}: {closest(name, (*GIVEN, *SIGNALS))}")
    found: dict[str, Tensor] = {"loss": losses_B.detach().float()}
    if "embedding" in names:
        if embeddings is None or embeddings.ndim != 2 or embeddings.shape[0] != losses_B.shape[0]:
            got = None if embeddings is None else tuple(embeddings.shape)
            raise ValueError(f"the method needs embeddings: give weigh(embeddings=) of shape (B, d), got {got}")
        found["embedding"] = embeddings.detach().float()
    derived = tuple(name for name in names if name not in GIVEN)
    if derived:
        if logits is None:
            raise ValueError(f"the method needs {', '.join(derived)}: give weigh(logits=) beside the losses")
        found |= _derived(derived, losses_B.detach(), logits.detach(), targets, head)
    return {name: found[name] for name in names}


def _derived(
    names: tuple[str, ...],
    losses_B: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    head: nn.Linear | Tensor | None,
) -> dict[str, Tensor]:
    if targets is None:
        raise ValueError("the method needs the targets too: give weigh(targets=), or a batch with a column 'label'")
    rows = losses_B.shape[0]
    if logits.ndim < 2 or logits.shape[0] != rows:
        raise ValueError(f"weigh(logits=) has shape {tuple(logits.shape)}: it must be ({rows}, classes, …)")
    of_boundaries = [name for name in names if name in BOUNDARY_SIGNALS]
    if of_boundaries and (targets.is_floating_point() or logits.ndim != 2):
        raise ValueError(
            f"{', '.join(of_boundaries)} need one class a sample: targets {tuple(targets.shape)} of logits "
            f"{tuple(logits.shape)} are several; choose a method that asks for other signals"
        )
    if targets.is_floating_point():
        if targets.shape != logits.shape or logits.ndim != 2:
            raise ValueError(
                f"targets of several labels {tuple(targets.shape)} must have the logits' shape {tuple(logits.shape)}"
            )
        return _multi_label(names, losses_B, logits, targets)
    if targets.shape != (rows, *logits.shape[2:]):
        raise ValueError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: "
            f"give class indices of shape {(rows, *logits.shape[2:])}"
        )
    if logits.ndim == 2:
        distances_CC = _distances(of_boundaries, head) if of_boundaries else None
        return compute_signals(names, logits, targets, losses_B, distances_CC=distances_CC)
    return _dense(names, losses_B, logits, targets)


def _distances(names: list[str], head: nn.Linear | Tensor | None) -> Tensor:
    if head is None:
        raise ValueError(
            f"the method needs {', '.join(names)}: give weigh(head=model.fc), the nn.Linear whose output the logits are"
        )
    return _LAST_HEAD(head if isinstance(head, Tensor) else head.weight)


def _dense(names: tuple[str, ...], losses_B: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rows, classes = logits.shape[:2]
    flat_PC = logits.flatten(2).transpose(1, 2).reshape(-1, classes)
    positions = flat_PC.shape[0] // rows
    seen = compute_signals(names, flat_PC, targets.reshape(-1), losses_B.repeat_interleave(positions))
    return {name: values.reshape(rows, positions, *values.shape[1:]).mean(1) for name, values in seen.items()}


def _multi_label(names: tuple[str, ...], losses_B: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Take every label for a decision between two classes."""
    rows, labels = logits.shape
    two = torch.stack([torch.zeros_like(logits), logits], dim=2).reshape(-1, 2)
    wanted = (targets.reshape(-1) >= 0.5).long()
    single = tuple(name for name in names if name != "probs")
    seen = compute_signals(single, two, wanted, losses_B.repeat_interleave(labels))
    means = {name: values.reshape(rows, labels).mean(1) for name, values in seen.items()}
    return means | ({"probs": logits.float().sigmoid()} if "probs" in names else {})
