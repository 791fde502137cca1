"""Per-sample signals: what a training step observes of a sample, derived from its logits.

Every signal is one registered function of `Outputs`. Probabilities are computed once a batch, in float32 whatever the
logits' dtype, and shared. EL2N is the error norm of Paul, Ganguli, Dziugaite (NeurIPS 2021, arXiv 2107.07075);
`margin` is the probability gap whose mean over epochs is the AUM of Pleiss et al. (NeurIPS 2020, arXiv 2001.10528),
in probabilities instead of logits as in CCS (Zheng et al., ICLR 2023, arXiv 2210.15809). The distances to decision
boundaries are those of `rayprune.nn.boundary`; what is recorded of them is finite, where that gives +inf.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayprune.core.objects import closest
from rayprune.nn.boundary import boundary_distance, class_boundaries

# What can't be told from the logits alone.
BOUNDARY_SIGNALS = ("boundary", "boundary_classes", "boundary_label", "boundary_label_unsigned")


@dataclass(frozen=True)
class Outputs:
    """What a step computed for a batch, detached.

    Args:
        logits_BC: (B, C) of any floating dtype.
        targets_B: (B,) int64 class indices.
        losses_B: (B,) the training loss of every sample.
        distances_CC: (C, C) float32 of `rayprune.nn.boundary.pair_distances`, for BOUNDARY_SIGNALS.
    """

    logits_BC: Tensor
    targets_B: Tensor
    losses_B: Tensor
    distances_CC: Tensor | None = None

    @cached_property
    def probs_BC(self) -> Tensor:
        """Give the softmax of the logits, (B, C) float32."""
        return self.logits_BC.float().softmax(dim=1)

    @cached_property
    def prob_label_B(self) -> Tensor:
        """Give the probability of the label, (B,) float32."""
        return self.probs_BC.gather(1, self.targets_B[:, None]).squeeze(1)

    @property
    def table_CC(self) -> Tensor:
        """Give the distances between the last layer's rows.

        Raises:
            ValueError: the step gave none, or a table of another number of classes.
        """
        num_classes = self.logits_BC.shape[1]
        if self.distances_CC is None:
            raise ValueError(
                "distances to a boundary need the last layer's weight: give "
                "distances_CC=pair_distances(model.fc.weight) of rayprune.nn.boundary"
            )
        if self.distances_CC.shape != (num_classes, num_classes):
            raise ValueError(
                f"the table of distances {tuple(self.distances_CC.shape)} does not fit {num_classes} logits: it must "
                "be of the weight of the layer whose output they are"
            )
        return self.distances_CC


Signal = Callable[[Outputs], Tensor]
SIGNALS: dict[str, Signal] = {}


def register_signal(function: Signal) -> Signal:
    """Add a signal to SIGNALS under its function's name."""
    SIGNALS[function.__name__] = function
    return function


def check_signals(names: Iterable[str]) -> None:
    """Refuse names that are no signals.

    Raises:
        ValueError: a name is not in SIGNALS.

    >>> check_signals(["loss", "entrpy"])
    Traceback (most recent call last):
    ValueError: unknown signal 'entrpy': did you mean 'entropy'? (valid: boundary, boundary_classes, boundary_label, \
boundary_label_unsigned, confidence, correct, el2n, entropy, loss, margin, prob_label, probs)
    """
    for name in names:
        if name not in SIGNALS:
            raise ValueError(f"unknown signal {name!r}: {closest(name, SIGNALS)}")


def signal_floats(name: str, num_classes: int) -> int:
    """Return how many float32 a signal holds for one sample.

    >>> signal_floats("loss", 10), signal_floats("probs", 10)
    (1, 10)
    """
    table_CC = torch.ones(1, 1).expand(num_classes, num_classes)  # C² numbers would be much to ask one
    outputs = Outputs(torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64), torch.zeros(1), table_CC)
    return SIGNALS[name](outputs).numel()


@torch.no_grad()
def compute_signals(
    names: Iterable[str],
    logits_BC: Tensor,
    targets_B: Tensor,
    losses_B: Tensor,
    *,
    distances_CC: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the named signals of a batch.

    Args:
        names: keys of SIGNALS.
        logits_BC: (B, C) of any floating dtype; may require grad.
        targets_B: (B,) int64 class indices in [0, C), on the logits' device.
        losses_B: (B,) the training loss of every sample.
        distances_CC: (C, C) float32 of `rayprune.nn.boundary.pair_distances`; BOUNDARY_SIGNALS need it.

    Returns:
        name -> detached float32 tensor, (B,), or (B, C) for `probs` and `boundary_classes`, on the logits' device.

    Raises:
        ValueError: a name is not in SIGNALS, or a signal's table is missing.
    """
    names = tuple(names)
    check_signals(names)
    outputs = Outputs(logits_BC.detach(), targets_B, losses_B.detach(), distances_CC)
    return {name: SIGNALS[name](outputs).float() for name in names}


@register_signal
def loss(outputs: Outputs) -> Tensor:
    """Give the training loss as the step computed it."""
    return outputs.losses_B


@register_signal
def correct(outputs: Outputs) -> Tensor:
    """Give 1 where the largest logit is the label's, else 0."""
    largest_B, class_B = outputs.logits_BC.max(dim=1)
    # The largest of a diverged row is NaN or infinite: it would count as a correct class 0.
    return (class_B == outputs.targets_B) & (largest_B.abs() < math.inf)


@register_signal
def confidence(outputs: Outputs) -> Tensor:
    """Give the largest probability."""
    return outputs.probs_BC.amax(dim=1)


@register_signal
def prob_label(outputs: Outputs) -> Tensor:
    """Give the label's probability, p_y."""
    return outputs.prob_label_B


@register_signal
def entropy(outputs: Outputs) -> Tensor:
    """Give the entropy of the prediction in nats, 0 log 0 being 0."""
    entropies_B: Tensor = torch.special.entr(outputs.probs_BC).sum(dim=1)
    return entropies_B


@register_signal
def el2n(outputs: Outputs) -> Tensor:
    """Give the Euclidean distance of the probabilities from the one-hot label."""
    errors_BC = outputs.probs_BC.scatter(1, outputs.targets_B[:, None], (outputs.prob_label_B - 1.0)[:, None])
    norms_B: Tensor = torch.linalg.vector_norm(errors_BC, dim=1)
    return norms_B


@register_signal
def margin(outputs: Outputs) -> Tensor:
    """Give the label's probability less the best other one, in [-1, 1]."""
    others_BC = outputs.probs_BC.scatter(1, outputs.targets_B[:, None], -1.0)
    gaps_B: Tensor = outputs.prob_label_B - others_BC.amax(dim=1)
    return gaps_B


@register_signal
def probs(outputs: Outputs) -> Tensor:
    """Give all probabilities, (B, C)."""
    return outputs.probs_BC


@register_signal
def boundary(outputs: Outputs) -> Tensor:
    """Give the distance to the nearest decision boundary of the predicted class, m(x), at least 0."""
    return _recordable(boundary_distance(outputs.logits_BC, outputs.table_CC))


@register_signal
def boundary_label(outputs: Outputs) -> Tensor:
    """Give the smallest signed distance to the label's boundaries: below 0 where another class is predicted."""
    return _recordable(boundary_distance(outputs.logits_BC, outputs.table_CC, outputs.targets_B))


@register_signal
def boundary_label_unsigned(outputs: Outputs) -> Tensor:
    """Give the distance to the nearest of the label's boundaries, on either side of it."""
    return _recordable(boundary_distance(outputs.logits_BC, outputs.table_CC, outputs.targets_B, signed=False))


@register_signal
def boundary_classes(outputs: Outputs) -> Tensor:
    """Give the distances to the predicted class's boundary with every class, (B, C); its own entry is m(x)."""
    return _recordable(class_boundaries(outputs.logits_BC, outputs.table_CC))


def _recordable(distances: Tensor) -> Tensor:
    """Put the largest float32 for +inf: the recorder takes what is not finite for a diverged sample."""
    return distances.clamp(max=torch.finfo(torch.float32).max)
