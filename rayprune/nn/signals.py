"""Per-sample signals: what a training step observes of a sample, derived from its logits.

Every signal is one registered function of `Outputs`. Probabilities are computed once a batch, in float32 whatever the
logits' dtype, and shared. EL2N is the error norm of Paul, Ganguli, Dziugaite (NeurIPS 2021, arXiv 2107.07075);
`margin` is the probability gap whose mean over epochs is the AUM of Pleiss et al. (NeurIPS 2020, arXiv 2001.10528),
in probabilities instead of logits as in CCS (Zheng et al., ICLR 2023, arXiv 2210.15809). The distances to decision
boundaries are those of `rayprune.nn.boundary`; what is recorded of them is finite, where that gives +inf.

Shapes: B batch, C classes.

Per-sample training losses.

Shapes: B batch, C classes.

One loss and one set of signals a sample, from the losses, logits and targets that a training loop has, of any task.

Shapes: B rows of this worker's share, C classes, P positions of a sample (tokens, pixels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.core.references import closest
from rayprune.errors import ConfigError
from rayprune.nn.boundary import PairDistances, boundary_distance, class_boundaries


def per_sample_loss(logits_BC: Tensor, targets_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy of every sample, in float32 even under autocast.

    Args:
        logits_BC: (B, C) of any floating dtype.
        targets_B: (B,) int64 class indices in [0, C).
        label_smoothing: share of the target mass spread evenly over all classes, in [0, 1].

    Returns:
        (B,) float32 (float64 of such logits), differentiable in the logits, not reduced.

    Raises:
        ConfigError: label_smoothing lies outside [0, 1].

    >>> import torch
    >>> per_sample_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ConfigError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    wide_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    return functional.cross_entropy(wide_BC, targets_B, reduction="none", label_smoothing=label_smoothing)


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
            ConfigError: the step gave none, or a table of another number of classes.
        """
        num_classes = self.logits_BC.shape[1]
        if self.distances_CC is None:
            raise ConfigError(
                "distances to a boundary need the last layer's weight: give "
                "distances_CC=pair_distances(model.fc.weight) of rayprune.nn.boundary"
            )
        if self.distances_CC.shape != (num_classes, num_classes):
            raise ConfigError(
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
        ConfigError: a name is not in SIGNALS.

    >>> check_signals(["loss", "entrpy"])
    Traceback (most recent call last):
    rayprune.errors.ConfigError: unknown signal 'entrpy': did you mean 'entropy'? (valid: boundary, \
boundary_classes, boundary_label, boundary_label_unsigned, confidence, correct, el2n, entropy, loss, \
margin, prob_label, probs)
    """
    for name in names:
        if name not in SIGNALS:
            raise ConfigError(f"unknown signal {name!r}: {closest(name, SIGNALS)}")


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
        ConfigError: a name is not in SIGNALS, or a signal's table is missing.
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
        ConfigError: a scalar, another number of rows, or a mask of another shape; with the cure.

    >>> losses_per_sample(torch.tensor([[1.0, 3.0], [5.0, 0.0]]), 2, torch.tensor([[1, 1], [1, 0]]))
    tensor([2., 5.])
    """
    if losses.ndim == 0:
        raise ConfigError(
            "weigh needs one loss a sample and got a scalar: compute the loss with reduction='none' "
            "(cross_entropy(logits, labels, reduction='none')) and let weigh take the mean"
        )
    if losses.shape[0] != num_rows:
        raise ConfigError(
            f"weigh got losses of shape {tuple(losses.shape)} for a batch of {num_rows}: the first axis must be the "
            "samples, in the batch's order"
        )
    if mask is not None:
        if mask.shape != losses.shape:
            raise ConfigError(f"mask {tuple(mask.shape)} and losses {tuple(losses.shape)} must have one shape")
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
        ConfigError: something needed was not given, or its shape does not fit.
    """
    names = tuple(names)
    for name in names:
        if name not in GIVEN and name not in SIGNALS:
            raise ConfigError(f"unknown signal {name!r}: {closest(name, (*GIVEN, *SIGNALS))}")
    found: dict[str, Tensor] = {"loss": losses_B.detach().float()}
    if "embedding" in names:
        if embeddings is None or embeddings.ndim != 2 or embeddings.shape[0] != losses_B.shape[0]:
            got = None if embeddings is None else tuple(embeddings.shape)
            raise ConfigError(f"the method needs embeddings: give weigh(embeddings=) of shape (B, d), got {got}")
        found["embedding"] = embeddings.detach().float()
    derived = tuple(name for name in names if name not in GIVEN)
    if derived:
        if logits is None:
            raise ConfigError(f"the method needs {', '.join(derived)}: give weigh(logits=) beside the losses")
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
        raise ConfigError("the method needs the targets too: give weigh(targets=), or a batch with a column 'label'")
    rows = losses_B.shape[0]
    if logits.ndim < 2 or logits.shape[0] != rows:
        raise ConfigError(f"weigh(logits=) has shape {tuple(logits.shape)}: it must be ({rows}, classes, …)")
    of_boundaries = [name for name in names if name in BOUNDARY_SIGNALS]
    if of_boundaries and (targets.is_floating_point() or logits.ndim != 2):
        raise ConfigError(
            f"{', '.join(of_boundaries)} need one class a sample: targets {tuple(targets.shape)} of logits "
            f"{tuple(logits.shape)} are several; choose a method that asks for other signals"
        )
    if targets.is_floating_point():
        if targets.shape != logits.shape or logits.ndim != 2:
            raise ConfigError(
                f"targets of several labels {tuple(targets.shape)} must have the logits' shape {tuple(logits.shape)}"
            )
        return _multi_label(names, losses_B, logits, targets)
    if targets.shape != (rows, *logits.shape[2:]):
        raise ConfigError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: "
            f"give class indices of shape {(rows, *logits.shape[2:])}"
        )
    if logits.ndim == 2:
        distances_CC = _distances(of_boundaries, head) if of_boundaries else None
        return compute_signals(names, logits, targets, losses_B, distances_CC=distances_CC)
    return _dense(names, losses_B, logits, targets)


def _distances(names: list[str], head: nn.Linear | Tensor | None) -> Tensor:
    if head is None:
        raise ConfigError(
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
