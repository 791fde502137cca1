"""Per-sample signals: what a training step observes of a sample, derived from its logits.

Every signal is one registered function of `Outputs`. Probabilities are computed once a batch, in float32 whatever the
logits' dtype, and shared. EL2N is the error norm of Paul, Ganguli, Dziugaite (NeurIPS 2021, arXiv 2107.07075);
`margin` is the probability gap whose mean over epochs is the AUM of Pleiss et al. (NeurIPS 2020, arXiv 2001.10528),
in probabilities instead of logits as in CCS (Zheng et al., ICLR 2023, arXiv 2210.15809).

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rayprune.core.objects import closest


@dataclass(frozen=True)
class Outputs:
    """What a step computed for a batch, detached.

    Args:
        logits_BC: (B, C) of any floating dtype.
        targets_B: (B,) int64 class indices.
        losses_B: (B,) the training loss of every sample.
    """

    logits_BC: Tensor
    targets_B: Tensor
    losses_B: Tensor

    @cached_property
    def probs_BC(self) -> Tensor:
        """Give the softmax of the logits, (B, C) float32."""
        return self.logits_BC.float().softmax(dim=1)

    @cached_property
    def prob_label_B(self) -> Tensor:
        """Give the probability of the label, (B,) float32."""
        return self.probs_BC.gather(1, self.targets_B[:, None]).squeeze(1)


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
    ValueError: unknown signal 'entrpy': did you mean 'entropy'? (valid: confidence, correct, el2n, entropy, loss, \
margin, prob_label, probs)
    """
    for name in names:
        if name not in SIGNALS:
            raise ValueError(f"unknown signal {name!r}: {closest(name, SIGNALS)}")


def signal_floats(name: str, num_classes: int) -> int:
    """Return how many float32 a signal holds for one sample.

    >>> signal_floats("loss", 10), signal_floats("probs", 10)
    (1, 10)
    """
    outputs = Outputs(torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    return SIGNALS[name](outputs).numel()


@torch.no_grad()
def compute_signals(names: Iterable[str], logits_BC: Tensor, targets_B: Tensor, losses_B: Tensor) -> dict[str, Tensor]:
    """Compute the named signals of a batch.

    Args:
        names: keys of SIGNALS.
        logits_BC: (B, C) of any floating dtype; may require grad.
        targets_B: (B,) int64 class indices in [0, C), on the logits' device.
        losses_B: (B,) the training loss of every sample.

    Returns:
        name -> detached float32 tensor, (B,), or (B, C) for `probs`, on the logits' device.

    Raises:
        ValueError: a name is not in SIGNALS.
    """
    names = tuple(names)
    check_signals(names)
    outputs = Outputs(logits_BC.detach(), targets_B, losses_B.detach())
    return {name: SIGNALS[name](outputs).float() for name in names}


@register_signal
def loss(outputs: Outputs) -> Tensor:
    """Give the training loss as the step computed it."""
    return outputs.losses_B


@register_signal
def correct(outputs: Outputs) -> Tensor:
    """Give 1 where the largest logit is the label's, else 0."""
    hit_B = outputs.logits_BC.argmax(dim=1) == outputs.targets_B
    # argmax takes NaN for the largest: a diverged row would count as a correct class 0.
    return hit_B & ~outputs.prob_label_B.isnan()


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
