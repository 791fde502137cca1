"""Exact distances of samples to the decision boundaries of a network's last linear layer.

DynaMS (Wang et al., ICLR 2023) selects by this margin. It is the MASE of Emam, Chu, Chiang, Czaja, Leapman, Goldblum,
Goldstein (Active learning at the ImageNet scale, 2021, arXiv 2111.12880): with z = W h + b and anchor class a,
m(x) = min over c≠a of (z_a − z_c)/‖w_a − w_c‖. The nearest boundary need not be that of the second largest logit.
Logits and one (C, C) table suffice: ‖w_a − w_c‖² = G_aa + G_cc − 2 G_ac with G = W Wᵀ, without a (B, C, D) tensor.

A class has no boundary with itself, nor with a class that has the same row of W: their distance in the table is 0, and
a sample is +inf away. A NaN among a row's logits makes every distance of the row NaN.

Shapes: B batch, C classes, D features of the last layer.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rayprune.errors import ConfigError

# Rows closer than 1e-6 of their norms count as equal: in float32 their logits differ only by rounding.
_SAME_SQUARED = 1e-12


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in eval mode, and restore each module's mode on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def last_linear(model: nn.Module, example: Tensor) -> str:
    """Find the nn.Linear whose output is the logits, by one forward in eval mode.

    Args:
        model: (B, …) inputs to (B, C) logits; its train and eval modes are restored.
        example: a batch of 2 rows, such as zeros, on the model's device.

    Returns:
        The layer's name, for `model.get_submodule`; "" if the model itself is an nn.Linear.

    Raises:
        ConfigError: there is no such layer, or its output is changed afterwards.
    """
    outputs: dict[str, tuple[Tensor, int]] = {}

    def remember(name: str, output: Tensor) -> None:
        # The version shows a change in place, which leaves the tensor's identity as it is.
        outputs[name] = (output, output._version)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: remember(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with eval_mode(model):
            logits = model(example)
    finally:
        for handle in handles:
            handle.remove()
    for name, (output, version) in reversed(outputs.items()):
        # The logits are the layer's output, or an unchanged view of it.
        if output.is_set_to(logits) and version == logits._version:
            return name
    last = next(reversed(outputs), None)
    reason = f"the output of its last one, {last!r}, is changed afterwards" if last is not None else "it calls none"
    raise ConfigError(
        f"the model's logits are not the output of an nn.Linear ({reason}): boundaries, embeddings, "
        "last-layer gradients and proxies need one, so let forward() return that layer's output unchanged, or choose "
        "signals and options that need none"
    )


def pair_distances(weight_CD: Tensor) -> Tensor:
    """Compute the distances between the rows of the last layer's weight.

    The Gram matrix is computed in float64: in float32, G_aa + G_cc − 2 G_ac cancels to noise for close rows.

    Args:
        weight_CD: (C, D) of any floating dtype; may require grad.

    Returns:
        (C, C) float32, detached: ‖w_a − w_c‖, and exactly 0 on the diagonal and for equal rows.

    >>> pair_distances(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 0.0], [1.0, 0.0]]))[0]
    tensor([0.0000, 1.4142, 4.0000, 0.0000])
    """
    weight_CD = weight_CD.detach().double()
    gram_CC = weight_CD @ weight_CD.T
    squares_C = gram_CC.diagonal()
    sums_CC = squares_C[:, None] + squares_C
    squares_CC = (sums_CC - 2.0 * gram_CC).clamp_(min=0.0)
    return squares_CC.masked_fill_(squares_CC <= _SAME_SQUARED * sums_CC, 0.0).sqrt_().float()


class PairDistances:
    """A cache of a layer's `pair_distances`, valid until its weight changes: a sweep computes them once.

    Args:
        num_features: use only the first D columns of the weight; None for all.
    """

    def __init__(self, num_features: int | None = None) -> None:
        self._num_features = num_features
        self._weight: weakref.ref[Tensor] | None = None
        self._version = -1
        self._table_CC = torch.empty(0, 0)

    def __call__(self, weight_CD: Tensor) -> Tensor:
        """Return `pair_distances` of the weight, or of its slice.

        Updates in place, by optimizers and load_state_dict, raise a tensor's version; those through `.data` do not and
        go unnoticed.
        """
        cached = self._weight() if self._weight is not None else None
        if cached is not weight_CD or self._version != weight_CD._version:
            self._table_CC = pair_distances(weight_CD[:, : self._num_features])
            self._weight, self._version = weakref.ref(weight_CD), weight_CD._version
        return self._table_CC


def boundary_distance(
    logits_BC: Tensor, distances_CC: Tensor, anchor_B: Tensor | None = None, *, signed: bool = True
) -> Tensor:
    """Compute the distance to the nearest boundary of the anchor class, m(x).

    Args:
        logits_BC: (B, C) of any floating dtype; computed in float32.
        distances_CC: (C, C) float32 of `pair_distances`.
        anchor_B: (B,) int64 classes, such as the labels; None for the predicted classes.
        signed: take the minimum of the signed distances, which are below 0 beyond a boundary, instead of their
            absolute values. No distance of a predicted class is below 0.

    Returns:
        (B,) float32; +inf without a boundary, NaN if a logit is NaN.

    >>> table = pair_distances(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3.0, 0.0]]))
    >>> boundary_distance(torch.tensor([[2.0, 0.5, 0.0]]), table)
    tensor([0.5000])
    """
    anchor_B = logits_BC.argmax(dim=1) if anchor_B is None else anchor_B
    distances_BC = _to_each_boundary(logits_BC, distances_CC, anchor_B)
    return (distances_BC if signed else distances_BC.abs()).amin(dim=1)


def class_boundaries(logits_BC: Tensor, distances_CC: Tensor) -> Tensor:
    """Compute the distances to the boundaries between the predicted class a and every other one.

    Args:
        logits_BC: (B, C) of any floating dtype; computed in float32.
        distances_CC: (C, C) float32 of `pair_distances`.

    Returns:
        (B, C) float32: entry c≠a is the distance to the boundary of a and c, entry a the smallest of them, m(x).
    """
    anchor_B = logits_BC.argmax(dim=1)
    distances_BC = _to_each_boundary(logits_BC, distances_CC, anchor_B)
    return distances_BC.scatter(1, anchor_B[:, None], distances_BC.amin(dim=1, keepdim=True))


def _to_each_boundary(logits_BC: Tensor, distances_CC: Tensor, anchor_B: Tensor) -> Tensor:
    logits_BC = logits_BC.float()
    norms_BC = distances_CC[anchor_B]
    gaps_BC = logits_BC.gather(1, anchor_B[:, None]) - logits_BC
    distances_BC = (gaps_BC / norms_BC).masked_fill_(norms_BC == 0.0, math.inf)
    # The fill hides a NaN of a class without a boundary.
    return distances_BC.masked_fill_(logits_BC.isnan().any(dim=1, keepdim=True), math.nan)
