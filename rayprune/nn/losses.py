"""Per-sample training losses.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def per_sample_loss(logits_BC: Tensor, targets_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy of every sample, in float32 even under autocast.

    Args:
        logits_BC: (B, C) of any floating dtype.
        targets_B: (B,) int64 class indices in [0, C).
        label_smoothing: share of the target mass spread evenly over all classes, in [0, 1].

    Returns:
        (B,) float32 (float64 of such logits), differentiable in the logits, not reduced.

    Raises:
        ValueError: label_smoothing lies outside [0, 1].

    >>> import torch
    >>> per_sample_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    wide_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return functional.cross_entropy(wide_BC, targets_B, reduction="none", label_smoothing=label_smoothing)
