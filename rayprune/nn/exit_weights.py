"""The arithmetic of learning to weigh samples by exit, L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310).

A small network gives every sample a number in (-1, 1) for each exit. Centred and scaled, they are the weights of the
samples' losses; what the network learns from is the loss of those samples at each exit that would leave there.

Shapes: B rows of a half batch, K exits, C classes. Padding rows are left out by `real_B`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["row", "col", "mat"]
# Sums a tensor over the ranks that share a batch.
Reduce = Callable[[Tensor], Tensor]


def centred(values_BK: Tensor, normalise: Normalise, real_B: Tensor, reduce: Reduce = lambda each: each) -> Tensor:
    """Subtract the mean over the real rows ("row": every exit's mean is 0), the exits ("col") or both ("mat").

    It is a symmetric projection: the gradient goes through the same function.

    Args:
        values_BK: (B, K); what padding rows hold does not matter.
        normalise: over what the mean is.
        real_B: (B,) bool, False for padding, whose rows come out as 0.
        reduce: sums over ranks where the mean is over all their rows.

    >>> centred(torch.tensor([[1.0, 0.0], [3.0, 8.0]]), "row", torch.tensor([True, True]))
    tensor([[-1., -4.],
            [ 1.,  4.]])
    """
    kept_BK = torch.where(real_B[:, None], values_BK, torch.zeros_like(values_BK))
    if normalise == "col":
        return kept_BK - kept_BK.mean(dim=1, keepdim=True)
    sums = reduce(torch.cat([kept_BK.sum(dim=0), real_B.sum().to(kept_BK.dtype)[None]]))
    means_K = sums[:-1] / sums[-1].clamp(min=1.0)
    if normalise == "mat":
        means_K = means_K.mean().expand_as(means_K)
    return torch.where(real_B[:, None], kept_BK - means_K, torch.zeros_like(kept_BK))


def weights_of(centred_BK: Tensor, epsilon: float, *, nonnegative: bool = False) -> Tensor:
    """Return the weights 1 + ε·centred, (B, K); those below 0 become 0 where `nonnegative`."""
    weights_BK = 1.0 + epsilon * centred_BK
    return weights_BK.clamp(min=0.0) if nonnegative else weights_BK


def weight_range(epsilon: float, normalise: Normalise, num_exits: int) -> tuple[float, float]:
    """Return the open interval that weights lie in.

    >>> [round(each, 2) for each in weight_range(0.8, "col", 5)]
    [-0.28, 2.28]
    """
    reach = 2.0 * epsilon * ((num_exits - 1) / num_exits if normalise == "col" else 1.0)
    return 1.0 - reach, 1.0 + reach


def exit_distribution(p: int, num_exits: int) -> Tensor:
    """Return the share of samples that leaves at each exit, (K,) float32: P_k ∝ q^k with q = p / 20.

    Args:
        p: 1..39; 20 is uniform, less leave early, more late.
        num_exits: K.

    >>> [round(share, 5) for share in exit_distribution(15, 5).tolist()]
    [0.32778, 0.24584, 0.18438, 0.13828, 0.10371]
    """
    # By logarithms in float32: at quotas that are whole numbers, how the share is rounded decides.
    logs_K = torch.log(torch.tensor([p / 20.0], dtype=torch.float32)) * torch.arange(1.0, num_exits + 1)
    shares_K = torch.exp(logs_K)
    return shares_K / shares_K.sum()


def exit_quotas(num_rows: int, shares_K: Tensor) -> list[int]:
    """Return how many of n rows leave at each exit, K numbers: floor(n · P_k) in float32; the last takes the rest.

    >>> exit_quotas(512, exit_distribution(15, 5))
    [167, 125, 94, 70, 56]
    """
    first = [int(count) for count in torch.floor(shares_K[:-1].float().cpu() * num_rows).tolist()]
    return [*first, num_rows - sum(first)]


def allocate_exits(confidences_BK: Tensor, real_B: Tensor, shares_K: Tensor) -> Tensor:
    """Give each row the exit that it leaves by: exit after exit, the most confident of those still there.

    Args:
        confidences_BK: (B, K) largest probability of every row at every exit; of equal ones the earlier row goes first.
        real_B: (B,) bool.
        shares_K: as of `exit_distribution`.

    Returns:
        (B,) int64 in 0..K-1; -1 for padding.

    >>> sure = torch.tensor([[0.9, 0.1], [0.2, 0.1], [0.5, 0.1]])
    >>> allocate_exits(sure, torch.tensor([True, True, True]), torch.tensor([0.4, 0.6]))
    tensor([0, 1, 1])
    """
    exits_B = torch.full_like(real_B, -1, dtype=torch.int64)
    left_B = real_B.clone()
    *first, _ = exit_quotas(int(real_B.sum()), shares_K)
    for place, quota in enumerate(first):
        sure_B = torch.where(left_B, confidences_BK[:, place], torch.full_like(confidences_BK[:, place], -1.0))
        chosen = torch.argsort(sure_B, descending=True, stable=True)[:quota]
        exits_B[chosen], left_B[chosen] = place, False
    return torch.where(left_B, torch.full_like(exits_B, len(first)), exits_B)


def exit_rows(exits_B: Tensor, num_exits: int) -> Tensor:
    """Return how many rows leave at each exit, (K,) int64."""
    return torch.stack([(exits_B == place).sum() for place in range(num_exits)])


def meta_loss(losses_BK: Tensor, exits_B: Tensor, rows_K: Tensor) -> Tensor:
    """Return Σ_k mean of the losses at exit k over the rows that leave there; an exit without rows adds nothing.

    Args:
        losses_BK: (B, K), differentiable.
        exits_B: (B,) as of `allocate_exits`.
        rows_K: (K,) how many rows leave at each exit; more than are here where other ranks hold the rest.
    """
    terms_K = [
        torch.where(exits_B == place, losses_BK[:, place], torch.zeros_like(losses_BK[:, place])).sum()
        / rows_K[place].clamp(min=1)
        for place in range(losses_BK.shape[1])
    ]
    return torch.stack(terms_K).sum()


def exit_weight_names(num_exits: int) -> tuple[str, ...]:
    """Return the names of the step's own signals.

    >>> exit_weight_names(2)
    ('weight_exit_1', 'weight_exit_2')
    """
    return tuple(f"weight_exit_{place + 1}" for place in range(num_exits))
