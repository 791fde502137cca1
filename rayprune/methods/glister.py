"""GLISTER: keep the samples whose gradients lower the loss on held-out samples.

Killamsetty, Sivasubramanian, Ramakrishnan, Iyer, "GLISTER: Generalization based Data Subset Selection for Efficient and
Robust Learning", AAAI 2021, arXiv 2012.10630. With the last-layer gradients g_i (`core.bases.gradients`) and the
mean gradient ḡ of the validation samples, a step of rate η on sample i lowers the validation loss by η⟨g_i, ḡ⟩ to first
order. The sample with the largest ⟨g_i, ḡ⟩ is kept, the last layer takes its step −η·g_i, which moves the validation
samples' logits, and ḡ is computed again, until M are kept. Weights are 1. η is 0.01, a usual learning rate: the paper's
η is that of the training.

Deliberate deviations. Validation: the paper has a validation set; here it is a random share of the training samples, of
every class if classes are chosen one by one. The kept set never contains a validation sample, so that none is kept
because it resembles itself. At most the samples to drop are held out, so that enough others are left, and at least one
wherever there is a choice. Blocks: ḡ is computed at most `updates` times for a class; between two of them the
M / updates best samples are kept at once (the paper's r rounds). Up to M = `updates` that is the greedy rule itself.
One subset after T epochs, where the paper chooses again every 20.

Cost: each update takes n·C multiplications (n·C·d for the last layer), and as many for the V validation samples; all
gradients of a class are in memory at once, 4C or 4(C + d) bytes each, or those of all samples without classes.

Shapes: n samples of a class, V of them held out, C classes, d inputs of the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.gradients import GradientMethod, Gradients, first_largest
from rayprune.core.table import Ids
from rayprune.errors import ConfigError
from rayprune.methods.registry import register

_SUM_TOLERANCE = 0.02  # of p − onehot(y), which sums to 0; float16 rounds it


@register("glister")
@dataclass(frozen=True, kw_only=True)
class GLISTER(GradientMethod):
    """Keep the samples whose last-layer gradients lower the loss on held-out training samples.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        validation_share: share of the samples, in (0, 1), that are held out for validation and never kept; at most the
            samples to drop.
        step_size: η > 0, the rate of the steps that the last layer takes for the kept samples.
        updates: how many times at most the validation gradient is computed in each class, ≥ 1.
        gradient: `logits`, or `last_layer` for the gradients of the last layer's weight and bias.
        balance: `proportional` or `even` choose class by class; `none` ignores classes.
        partition_size: largest number of samples that are ranked together, ≥ 2; null never splits a class.
        storage: how the gradients are stored on the disk: float32, or float16 in half the space.
    """

    keeps = "the gradients that lower a held-out loss"
    paper = "Killamsetty et al., AAAI 2021, arXiv 2012.10630"

    validation_share: float = 0.1
    step_size: float = 0.01
    updates: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.validation_share < 1.0:
            raise ConfigError(f"validation_share {self.validation_share!r} is outside (0, 1): 0.1 holds out a tenth")
        if self.step_size <= 0.0:
            raise ConfigError(f"step_size {self.step_size!r} must be above 0, such as a learning rate")
        if self.updates < 1:
            raise ConfigError(f"updates {self.updates} must be at least 1")

    def pick(
        self, gradients: Gradients, count: int, label: int | None, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return 1 for the chosen samples, (n,)."""
        num = len(gradients)
        num_held = min(max(1, round(self.validation_share * num)), num - count)
        held = np.zeros(num, dtype=bool)
        held[rng.choice(num, num_held, replace=False)] = True
        candidates, validation = np.flatnonzero(~held), gradients.take(np.flatnonzero(held))
        block = -(-count // self.updates)
        chosen = taylor_greedy(gradients.take(candidates), validation, count, self.step_size, block)
        weights = np.zeros(num)
        weights[candidates[chosen]] = 1.0
        return weights


def taylor_greedy(candidates: Gradients, validation: Gradients, count: int, step_size: float, block: int = 1) -> Ids:
    """Choose the candidates that lower the validation loss most.

    Args:
        candidates: of n samples.
        validation: of V samples, at least 1.
        count: in [1, n].
        step_size: η.
        block: number of samples between two computations of the validation gradient.

    Returns:
        (count,) positions in the order of choice; inside a block they ascend.

    >>> candidates = Gradients(np.array([[-0.5, 0.5], [0.2, -0.2], [-0.9, 0.9]]))
    >>> taylor_greedy(candidates, Gradients(np.array([[-0.5, 0.5]])), 2, step_size=1.0).tolist()
    [2, 0]
    """
    logits, onehot = _logits(validation)
    current, taken = validation, np.zeros(len(candidates), dtype=bool)
    blocks: list[Ids] = []
    moved = np.zeros_like(validation.total())
    for start in range(0, count, block):
        gains = candidates.products(current.total() / len(validation))
        gains[taken] = -np.inf
        chosen = first_largest(gains, min(block, count - start))
        taken[chosen] = True
        blocks.append(chosen)
        moved += candidates.take(chosen).total()
        probs = _softmax(logits - step_size * validation.logit_changes(moved))
        current = Gradients(probs - onehot, validation.inputs)
    return np.concatenate(blocks)


def _logits(gradients: Gradients) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return log-probabilities and one-hot labels, (V, C) each, of gradients p − onehot(y).

    Raises:
        ConfigError: they are other gradients.
    """
    errors = gradients.errors.astype(np.float64)
    if np.abs(errors.sum(axis=1)).max() > _SUM_TOLERANCE:
        raise ConfigError(
            "glister needs one class per sample, and these gradients of the logits do not sum to 0: use another method"
        )
    # The label's entry is the only one below 0. Where all are 0, p is one-hot and stays so, whichever class it is.
    onehot = np.zeros_like(errors)
    onehot[np.arange(len(gradients)), errors.argmin(axis=1)] = 1.0
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(errors + onehot, 0.0)), onehot


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probs
