"""Per-sample losses and signals: what training observes of every sample.

A signal is one registered function of `Outputs`. The train steps call `compute_signals`, for one class per sample; a
user's loop calls `signals_per_sample`, which also takes dense and multi-label targets.

Probabilities are computed once per batch, in float32 whatever the logits' dtype. EL2N is the error norm of Paul,
Ganguli, Dziugaite (NeurIPS 2021, arXiv 2107.07075). The mean of `logit_margin` over epochs is the AUM of Pleiss et al.
(NeurIPS 2020, arXiv 2001.10528); `margin` is the same gap in probabilities, as in CCS (Zheng et al., ICLR 2023, arXiv
2210.15809). The boundary signals are the distances of `rayprune.nn.boundary`, clipped to finite values.

Shapes: B batch, C classes, P positions of a sample (tokens, pixels).
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

# Axes of losses that are positions of a sample.
TokenAxis = int | tuple[int, ...] | None

# A user's loop passes these directly; every other signal is derived from logits.
DIRECT_SIGNALS = ("loss", "embedding")
# These need the distances between the last layer's rows besides the logits.
BOUNDARY_SIGNALS = ("boundary", "boundary_classes", "boundary_label", "boundary_label_unsigned")
# These need the inputs of the last layer.
EMBEDDING_SIGNALS = ("embedding", "grand")

# A sweep uses the same layer for every batch.
_HEAD_DISTANCES = PairDistances()


def per_sample_loss(logits_BC: Tensor, targets_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross entropy of every sample, in float32 even under autocast.

    Args:
        logits_BC: (B, C) of any floating dtype.
        targets_B: (B,) int64 class indices in [0, C).
        label_smoothing: share of the target mass spread evenly over all classes, in [0, 1].

    Returns:
        (B,) float32 (float64 for float64 logits), not reduced, differentiable with respect to the logits.

    >>> import torch
    >>> per_sample_loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    return functional.cross_entropy(_wide(logits_BC), targets_B, reduction="none", label_smoothing=label_smoothing)


def max_probability(logits: Tensor) -> Tensor:
    """Return the largest softmax probability of logits (…, C) as (…), in float32 or float64.

    >>> max_probability(torch.tensor([[0.0, 0.0], [0.0, 100.0]]))
    tensor([0.5000, 1.0000])
    """
    return _wide(logits).softmax(dim=-1).amax(dim=-1)


def losses_per_sample(
    losses: Tensor, num_rows: int, mask: Tensor | None = None, token_axis: TokenAxis = None
) -> Tensor:
    """Reduce losses to one per sample: the mean over every axis but the first.

    Logits (B, C) have the shape of token losses (B, T), so further axes must be declared, by `mask` or `token_axis`.

    Args:
        losses: (B,), (B, T), (B, 1, …) or (B, H, W), differentiable.
        num_rows: B of the batch.
        mask: the weight of every position, of the losses' shape; 0 leaves a position (a padding token) out. None
            weights all positions equally.
        token_axis: every axis but the first, as an int or a tuple: those of tokens or pixels.

    Returns:
        (B,) of the losses' dtype; 0 for a sample whose mask is all 0.

    Raises:
        ConfigError: not a tensor, a scalar, another number of rows, axes that are not declared, or a mask of another
            shape.

    >>> losses_per_sample(torch.tensor([[1.0, 3.0], [5.0, 0.0]]), 2, torch.tensor([[1, 1], [1, 0]]))
    tensor([2., 5.])
    """
    if not isinstance(losses, Tensor):
        raise ConfigError(
            f"weigh needs losses as a tensor (B,) and got {type(losses).__name__}: give the result of a loss function "
            "with reduction='none', without .item() or .numpy()"
        )
    if losses.ndim == 0:
        raise ConfigError(
            "weigh needs one loss per sample and got a scalar: compute the loss with reduction='none' "
            "(cross_entropy(logits, labels, reduction='none')) and let weigh take the mean"
        )
    if losses.shape[0] != num_rows:
        raise ConfigError(
            f"weigh got losses of shape {tuple(losses.shape)} for a batch of {num_rows}: the first axis must be the "
            "samples, in the batch's order"
        )
    axes = (token_axis,) if isinstance(token_axis, int) else tuple(token_axis or ())
    further = tuple(range(1, losses.ndim))
    if axes and tuple(sorted(axis % losses.ndim for axis in axes)) != further:
        raise ConfigError(
            f"token_axis {token_axis!r} does not name the axes {further} of losses of shape {tuple(losses.shape)}: "
            "name all axes but the first"
        )
    if mask is None:
        if losses[0].numel() > 1 and not axes:
            raise ConfigError(
                f"weigh got {tuple(losses.shape)} numbers for {num_rows} samples, which could be logits: give it one "
                "loss per sample, (B,); for losses of tokens or pixels say mask= or token_axis=1"
            )
        return losses if losses.ndim == 1 else losses.flatten(1).mean(1)
    if mask.shape != losses.shape:
        raise ConfigError(f"mask {tuple(mask.shape)} and losses {tuple(losses.shape)} must have the same shape")
    weights_BP, losses_BP = mask.to(losses.dtype).reshape(num_rows, -1), losses.reshape(num_rows, -1)
    # A NaN loss at a masked position must not reach the sum.
    sums_B = (losses_BP.where(weights_BP != 0, torch.zeros_like(losses_BP)) * weights_BP).sum(1)
    totals_B = weights_BP.sum(1)
    return sums_B / totals_B.where(totals_B > 0, torch.ones_like(totals_B))


def weighted_mean(losses_B: Tensor, weights_B: Tensor, batch_rows: float) -> Tensor:
    """Return Σ(w·l) ÷ batch_rows, a scalar.

    The divisor is a worker's number of rows in every global batch, never Σw and never the length of a short batch.
    DDP's mean over the ranks is then the weighted mean over the global batch, and every sample of an epoch counts by
    its weight alone.
    """
    if losses_B.dtype != torch.float64:
        losses_B = losses_B.float()  # the sum of many float16 losses would overflow before it is divided
    # A NaN loss of a padding row stays out of the mean (its gradient, where logits are NaN, cannot be kept out).
    weighted_B = torch.where(weights_B > 0, losses_B * weights_B, torch.zeros_like(losses_B))
    return weighted_B.sum() / batch_rows


@dataclass(frozen=True)
class Outputs:
    """A step's outputs for a batch, detached.

    Args:
        logits_BC: (B, C) of any floating dtype.
        targets_B: (B,) int64 class indices.
        losses_B: (B,) the training loss of every sample.
        distances_CC: (C, C) float32 of `rayprune.nn.boundary.pair_distances`, for BOUNDARY_SIGNALS.
        embeddings_BD: (B, D) the inputs of the last layer, for EMBEDDING_SIGNALS.
    """

    logits_BC: Tensor
    targets_B: Tensor
    losses_B: Tensor
    distances_CC: Tensor | None = None
    embeddings_BD: Tensor | None = None

    @cached_property
    def probs_BC(self) -> Tensor:
        """The softmax of the logits, (B, C) float32."""
        return self.logits_BC.float().softmax(dim=1)

    @cached_property
    def prob_label_B(self) -> Tensor:
        """The probability of the label, (B,) float32."""
        return self.probs_BC.gather(1, self.targets_B[:, None]).squeeze(1)

    @cached_property
    def errors_BC(self) -> Tensor:
        """The probabilities minus the one-hot label, (B, C) float32: the loss's gradient with respect to the logits."""
        return self.probs_BC.scatter(1, self.targets_B[:, None], (self.prob_label_B - 1.0)[:, None])

    @property
    def known_embeddings_BD(self) -> Tensor:
        """The embeddings as (B, D) float32.

        Raises:
            ConfigError: there are none.
        """
        if self.embeddings_BD is None:
            raise ConfigError(
                "signals of embeddings need the last layer's inputs: give a train step head=last_linear(…), weigh and "
                "compute_signals embeddings"
            )
        return self.embeddings_BD.flatten(1).float()

    @property
    def pair_distances_CC(self) -> Tensor:
        """The distances between the last layer's rows, checked against the logits.

        Raises:
            ConfigError: the step passed none, or those of another number of classes.
        """
        num_classes = self.logits_BC.shape[1]
        if self.distances_CC is None:
            raise ConfigError(
                "signals of decision boundaries need the last layer's weight: give a train step head=last_linear(…), "
                "compute_signals distances_CC=pair_distances(model.fc.weight), both of rayprune.nn.boundary"
            )
        if self.distances_CC.shape != (num_classes, num_classes):
            raise ConfigError(
                f"the distances {tuple(self.distances_CC.shape)} do not fit {num_classes} logits: compute them from "
                "the weight of the layer whose output the logits are"
            )
        return self.distances_CC


Signal = Callable[[Outputs], Tensor]
SIGNALS: dict[str, Signal] = {}


def register_signal(function: Signal) -> Signal:
    """Add a signal to SIGNALS under its function's name."""
    SIGNALS[function.__name__] = function
    return function


def check_signals(names: Iterable[str], valid: Iterable[str] = SIGNALS) -> None:
    """Refuse names that are not signals.

    Raises:
        ConfigError: a name is not among the valid ones.

    >>> check_signals(["loss", "entrpy"], ("entropy", "loss"))
    Traceback (most recent call last):
    rayprune.errors.ConfigError: unknown signal 'entrpy': did you mean 'entropy'? (valid: entropy, loss)
    """
    for name in names:
        if name not in valid:
            raise ConfigError(f"unknown signal {name!r}: {closest(name, valid)}")


def signal_floats(name: str, num_classes: int, num_features: int = 1) -> int:
    """Return how many float32 a signal holds for one sample, with D features in an embedding.

    >>> signal_floats("loss", 10), signal_floats("probs", 10)
    (1, 10)
    """
    distances_CC = torch.ones(1, 1).expand(num_classes, num_classes)  # without the memory of C² numbers
    one = (torch.zeros(1, num_classes), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    outputs = Outputs(*one, distances_CC, torch.zeros(1, num_features))
    return SIGNALS[name](outputs).numel()


@torch.no_grad()
def compute_signals(
    names: Iterable[str],
    logits_BC: Tensor,
    targets_B: Tensor,
    losses_B: Tensor,
    *,
    distances_CC: Tensor | None = None,
    embeddings_BD: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the named signals of a batch.

    Args:
        names: keys of SIGNALS.
        logits_BC: (B, C) of any floating dtype; may require grad.
        targets_B: (B,) int64 class indices in [0, C), on the logits' device.
        losses_B: (B,) the training loss of every sample.
        distances_CC: (C, C) float32 of `rayprune.nn.boundary.pair_distances`; BOUNDARY_SIGNALS need it.
        embeddings_BD: (B, D) inputs of the last layer; EMBEDDING_SIGNALS need them.

    Returns:
        name → detached float32 tensor on the logits' device: (B,), (B, C) for `probs`, `logit_gradient` and
        `boundary_classes`, (B, D) for `embedding`.

    Raises:
        ConfigError: a name is not in SIGNALS, distances_CC is missing or of another shape, or embeddings are missing.
    """
    names = tuple(names)
    check_signals(names)
    embeddings_BD = None if embeddings_BD is None else embeddings_BD.detach()
    outputs = Outputs(logits_BC.detach(), targets_B, losses_B.detach(), distances_CC, embeddings_BD)
    return {name: SIGNALS[name](outputs).float() for name in names}


@torch.no_grad()
def signals_per_sample(
    names: Iterable[str],
    losses_B: Tensor,
    *,
    logits: Tensor | None = None,
    targets: Tensor | None = None,
    embeddings: Tensor | None = None,
    head: nn.Linear | Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the named signals of a batch of any task.

    Args:
        names: `loss`, `embedding`, or keys of SIGNALS, which need logits and targets.
        losses_B: (B,) the loss of every sample.
        logits: (B, C) for classes, (B, C, …) for dense targets (B, …), (B, C) for multi-label targets (B, C).
        targets: int64 class indices (B,) or (B, …); floating (B, C) in [0, 1] for several labels per sample.
        embeddings: (B, d).
        head: the layer whose output the logits are, or its weight (C, D); BOUNDARY_SIGNALS need it.

    Returns:
        name → (B,) or (B, d) float32, detached. Dense signals are means over the positions, multi-label signals means
        over the labels.

    Raises:
        ConfigError: a required argument is missing, or its shape does not fit.
    """
    names = tuple(names)
    check_signals(names, (*DIRECT_SIGNALS, *SIGNALS))
    signals: dict[str, Tensor] = {"loss": losses_B.detach().float()}
    if "embedding" in names:
        if embeddings is None or embeddings.ndim != 2 or embeddings.shape[0] != losses_B.shape[0]:
            shape = None if embeddings is None else tuple(embeddings.shape)
            raise ConfigError(f"the method needs embeddings: give weigh(embeddings=) of shape (B, d), got {shape}")
        signals["embedding"] = embeddings.detach().float()
    if derived := tuple(name for name in names if name not in DIRECT_SIGNALS):
        if logits is None:
            raise ConfigError(f"the method needs {', '.join(derived)}: give weigh(logits=) beside the losses")
        if targets is None:
            raise ConfigError("the method needs the targets: give weigh(targets=), or a batch with a column 'label'")
        signals |= _derived_signals(derived, losses_B.detach(), logits.detach(), targets, head, embeddings)
    return {name: signals[name] for name in names}


def _derived_signals(
    names: tuple[str, ...],
    losses_B: Tensor,
    logits: Tensor,
    targets: Tensor,
    head: nn.Linear | Tensor | None,
    embeddings: Tensor | None,
) -> dict[str, Tensor]:
    rows, multi_label = losses_B.shape[0], targets.is_floating_point()
    if logits.ndim < 2 or logits.shape[0] != rows:
        raise ConfigError(f"weigh(logits=) has shape {tuple(logits.shape)}: it must be ({rows}, classes, …)")
    boundaries = [name for name in names if name in BOUNDARY_SIGNALS]
    of_one_class = [name for name in names if name in (*BOUNDARY_SIGNALS, *EMBEDDING_SIGNALS)]
    if of_one_class and (multi_label or logits.ndim != 2):
        raise ConfigError(
            f"{', '.join(of_one_class)} need one class per sample, got targets {tuple(targets.shape)} and logits "
            f"{tuple(logits.shape)}: choose a method that uses other signals"
        )
    if multi_label:
        if targets.shape != logits.shape or logits.ndim != 2:
            raise ConfigError(
                f"targets of several labels {tuple(targets.shape)} must have the logits' shape {tuple(logits.shape)}"
            )
        return _multi_label_signals(names, losses_B, logits, targets)
    if targets.shape != (rows, *logits.shape[2:]):
        raise ConfigError(
            f"targets {tuple(targets.shape)} do not fit logits {tuple(logits.shape)}: "
            f"give class indices of shape {(rows, *logits.shape[2:])}"
        )
    if logits.ndim > 2:
        return _dense_signals(names, losses_B, logits, targets)
    if not boundaries:
        return compute_signals(names, logits, targets, losses_B, embeddings_BD=embeddings)
    if head is None:
        raise ConfigError(
            f"the method needs {', '.join(boundaries)}: give weigh(head=model.fc), the nn.Linear that gives the logits"
        )
    distances_CC = _HEAD_DISTANCES(head if isinstance(head, Tensor) else head.weight)
    return compute_signals(names, logits, targets, losses_B, distances_CC=distances_CC, embeddings_BD=embeddings)


def _dense_signals(names: tuple[str, ...], losses_B: Tensor, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    rows, classes = logits.shape[:2]
    flat = logits.flatten(2).transpose(1, 2).reshape(-1, classes)
    positions = flat.shape[0] // rows
    signals = compute_signals(names, flat, targets.reshape(-1), losses_B.repeat_interleave(positions))
    return {name: values.reshape(rows, positions, *values.shape[1:]).mean(1) for name, values in signals.items()}


def _multi_label_signals(
    names: tuple[str, ...], losses_B: Tensor, logits: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Treat every label as a decision between two classes."""
    rows, labels = logits.shape
    binary = torch.stack([torch.zeros_like(logits), logits], dim=2).reshape(-1, 2)
    classes = (targets.reshape(-1) >= 0.5).long()
    scalars = tuple(name for name in names if name not in ("probs", "logit_gradient"))
    signals = compute_signals(scalars, binary, classes, losses_B.repeat_interleave(labels))
    means = {name: values.reshape(rows, labels).mean(1) for name, values in signals.items()}
    probs = logits.float().sigmoid()
    vectors = {"probs": probs, "logit_gradient": probs - targets}
    return means | {name: vectors[name] for name in names if name in vectors}


@register_signal
def loss(outputs: Outputs) -> Tensor:
    """Return the training loss as the step computed it."""
    return outputs.losses_B


@register_signal
def correct(outputs: Outputs) -> Tensor:
    """Return 1 where the largest logit is the label's, else 0."""
    largest_B, class_B = outputs.logits_BC.max(dim=1)
    # The largest logit of a diverged row is NaN or infinite: the row would count as a correct class 0.
    return (class_B == outputs.targets_B) & (largest_B.abs() < math.inf)


@register_signal
def confidence(outputs: Outputs) -> Tensor:
    """Return the largest probability."""
    return outputs.probs_BC.amax(dim=1)


@register_signal
def prob_label(outputs: Outputs) -> Tensor:
    """Return the label's probability, p_y."""
    return outputs.prob_label_B


@register_signal
def entropy(outputs: Outputs) -> Tensor:
    """Return the entropy of the prediction in nats, with 0 log 0 = 0."""
    return torch.special.entr(outputs.probs_BC).sum(dim=1)


@register_signal
def el2n(outputs: Outputs) -> Tensor:
    """Return the Euclidean distance of the probabilities from the one-hot label."""
    return torch.linalg.vector_norm(outputs.errors_BC, dim=1)


@register_signal
def logit_gradient(outputs: Outputs) -> Tensor:
    """Return the gradient of the plain cross entropy with respect to the logits, p − onehot(y), (B, C)."""
    return outputs.errors_BC


@register_signal
def embedding(outputs: Outputs) -> Tensor:
    """Return the inputs of the last layer, (B, D)."""
    return outputs.known_embeddings_BD


@register_signal
def grand(outputs: Outputs) -> Tensor:
    """Return the norm of the last layer's gradient, weight and bias: ‖p − onehot(y)‖·sqrt(1 + ‖h‖²)."""
    squares_B = outputs.known_embeddings_BD.square().sum(dim=1)
    return el2n(outputs) * (1.0 + squares_B).sqrt()


@register_signal
def top_gap(outputs: Outputs) -> Tensor:
    """Return the largest minus the second largest probability, in [0, 1]; 1 with one class."""
    if outputs.logits_BC.shape[1] < 2:
        return outputs.probs_BC[:, 0]
    first_B, second_B = outputs.probs_BC.topk(2, dim=1).values.unbind(dim=1)
    return first_B - second_B


@register_signal
def margin(outputs: Outputs) -> Tensor:
    """Return the label's probability minus the largest other one, in [-1, 1]."""
    others_BC = outputs.probs_BC.scatter(1, outputs.targets_B[:, None], -1.0)
    return outputs.prob_label_B - others_BC.amax(dim=1)


@register_signal
def logit_margin(outputs: Outputs) -> Tensor:
    """Return the label's logit minus the largest other one."""
    logits_BC, label_B1 = _wide(outputs.logits_BC), outputs.targets_B[:, None]
    others_BC = logits_BC.scatter(1, label_B1, -math.inf)
    return logits_BC.gather(1, label_B1).squeeze(1) - others_BC.amax(dim=1)


@register_signal
def probs(outputs: Outputs) -> Tensor:
    """Return all probabilities, (B, C)."""
    return outputs.probs_BC


@register_signal
def boundary(outputs: Outputs) -> Tensor:
    """Return the distance to the nearest decision boundary of the predicted class, m(x), at least 0."""
    return _finite(boundary_distance(outputs.logits_BC, outputs.pair_distances_CC))


@register_signal
def boundary_label(outputs: Outputs) -> Tensor:
    """Return the smallest signed distance to the label's boundaries, below 0 where another class is predicted."""
    return _finite(boundary_distance(outputs.logits_BC, outputs.pair_distances_CC, outputs.targets_B))


@register_signal
def boundary_label_unsigned(outputs: Outputs) -> Tensor:
    """Return the distance to the nearest of the label's boundaries, on either side of it."""
    return _finite(boundary_distance(outputs.logits_BC, outputs.pair_distances_CC, outputs.targets_B, signed=False))


@register_signal
def boundary_classes(outputs: Outputs) -> Tensor:
    """Return the distances to the predicted class's boundary with every class, (B, C); its own entry is m(x)."""
    return _finite(class_boundaries(outputs.logits_BC, outputs.pair_distances_CC))


def _finite(distances: Tensor) -> Tensor:
    """Replace +inf by the largest float32: the recorder counts a sample whose signals are not finite as diverged."""
    return distances.clamp(max=torch.finfo(torch.float32).max)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
