"""The two halves of a batch that a step trains on in turn.

Shapes: B rows of a batch, H of a half, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Inputs and targets.
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Half:
    """Rows to train on: inputs (H, …), targets (H,), the pruner's factors (H,), 0 for padding."""

    inputs: Tensor
    targets_H: Tensor
    factors_H: Tensor

    @property
    def real_H(self) -> Tensor:
        """False for padding, (H,) bool."""
        return self.factors_H > 0


def halves_of(inputs: Tensor, targets_B: Tensor, factors_B: Tensor) -> tuple[Half, Half]:
    """Return the first ⌈B/2⌉ rows and the rest."""
    middle = -(-len(targets_B) // 2)
    first, second = slice(0, middle), slice(middle, len(targets_B))
    return Half(inputs[first], targets_B[first], factors_B[first]), Half(
        inputs[second], targets_B[second], factors_B[second]
    )


def confidences(logits_KHC: Tensor) -> Tensor:
    """Return the largest probability of every row at every exit, (H, K), detached."""
    logits = logits_KHC.detach()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.softmax(dim=2).amax(dim=2).T


def joined(found: Iterable[dict[str, Tensor] | None], sizes: list[int]) -> dict[str, Tensor]:
    """Put the halves' signals together; of a half of padding that was left out, zeros, which nobody counts."""
    parts = list(found)
    like = next(part for part in parts if part is not None)
    return {
        name: torch.cat(
            [
                value.new_zeros((size, *value.shape[1:])) if part is None else part[name]
                for part, size in zip(parts, sizes, strict=True)
            ]
        )
        for name, value in like.items()
    }
