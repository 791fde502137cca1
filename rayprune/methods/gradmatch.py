"""GradMatch: keep the samples whose weighted gradients add up to the gradient of all.

Killamsetty, Sivasubramanian, Ramakrishnan, De, Iyer, "GRAD-MATCH: Gradient Matching based Data Subset Selection for
Efficient Deep Model Training", ICML 2021, arXiv 2103.00123. With the last-layer gradients g_i of a class
(`core.bases.gradients`) and their sum b, orthogonal matching pursuit minimizes ‖b − Σ w_i g_i‖² + λ‖w‖² over w ≥ 0
with M weights above 0: it adds the sample with the largest ⟨g_i, b − Σ w g⟩ (not normalized by ‖g_i‖), and fits the
weights of the chosen ones again by non-negative least squares. λ is 0.5, as in the authors' experiments.

Scale: the weights w are not normalized and sum to no round number (`weight_sum` in metrics.jsonl). Training gets them
over their mean, so that they sum to M. The authors' program divides by the sum over each batch, which has the same
scale up to the draw of the batch.

The chosen set can be exhausted before M samples are found: no other gradient points along the residual, or the residual
is 0. The authors' program adds random samples of weight 1, whatever the scale of the others. Here the pursuit starts
again on the samples that are left, with the same target b, as often as needed; the weights of each round are multiplied
by its share of the samples, so that their sum still matches b. Samples that no round takes, such as those without a
gradient, follow by their inner product with b, at the mean weight of the others.

More deliberate deviations: one subset after T epochs, where the paper chooses again every 20; the non-negative fit is
exact (Lawson, Hanson 1974), where the authors' program drops the smallest negative weight for good; λ also applies to
the first sample; a class of more than `partition_size` samples is split at random, and each part matches its own sum;
where nothing is dropped, all weights are 1. λ is at least 1e-8 of the largest squared norm, also if it is set to 0, and
an inner product with the residual below 1e-7 of the first one counts as 0.

Cost: with D = C for logits and D = min(C·(d+1), n) for the last layer, a part of n samples takes n·D + D² operations
for each kept sample, and 8·(n·D + D²) bytes, besides 8n² for the last layer.

Shapes: n samples of a part, C classes, d inputs of the last layer, D numbers of a feature vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.pursuit import pursue
from rayprune.core.bases.gradients import GradientMethod, Gradients, first_largest
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("gradmatch")
@dataclass(frozen=True, kw_only=True)
class GradMatch(GradientMethod):
    """Keep the samples whose weighted last-layer gradients add up to the gradient of all.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        ridge: λ ≥ 0, the penalty on squared weights. At 0, samples with small gradients can get very large weights.
        own_class: compare only the part of the gradient that belongs to the output of the sample's own class, the
            paper's per-gradient approximation; it needs a balance other than none.
        gradient: `logits`, or `last_layer` for the gradients of the last layer's weight and bias.
        balance: `proportional` or `even` choose class by class; `none` ignores classes.
        partition_size: largest number of samples whose sum is matched at once, ≥ 2; null never splits a class.
        storage: how the gradients are stored on the disk: float32, or float16 in half the space.
    """

    keeps = "the gradients that add up to that of all"
    paper = "Killamsetty et al., ICML 2021, arXiv 2103.00123"

    ridge: float = 0.5
    own_class: bool = False
    partition_size: int | None = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ridge < 0.0:
            raise ConfigError(f"ridge {self.ridge!r} is below 0: use 0 for none")
        if self.own_class and self.balance == "none":
            raise ConfigError("own_class compares samples of one class: use balance=proportional or even with it")

    def pick(
        self, gradients: Gradients, count: int, label: int | None, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return the weights, (n,)."""
        if self.own_class and label is not None:
            num_classes = gradients.errors.shape[1]
            if label >= num_classes:
                raise ConfigError(
                    f"label {label} is outside the model's {num_classes} classes: correct the label, or the model"
                )
            gradients = Gradients(gradients.errors[:, [label]], gradients.inputs)
        return match_sum(gradients.features(), count, self.ridge)


def match_sum(features: NDArray[np.float64], count: int, ridge: float) -> NDArray[np.float64]:
    """Return weights of exactly `count` rows of (n, D) features whose weighted sum is close to the sum of all, (n,).

    >>> g = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])
    >>> match_sum(g, 2, ridge=0.0).round(4).tolist()
    [0.0, 1.5, 0.0, 1.6667]
    """
    target, weights = features.sum(axis=0), np.zeros(features.shape[0])
    left, num_picked = np.arange(weights.size), 0
    while num_picked < count:
        of_round = pursue(features[left], target, count - num_picked, ridge)
        picked = of_round > 0.0
        size = int(np.count_nonzero(picked))
        if not size:
            break
        weights[left[picked]] = of_round[picked] * size
        left, num_picked = left[~picked], num_picked + size
    weights /= max(num_picked, 1)
    if num_picked < count:
        rest = left[first_largest(features[left] @ target, count - num_picked)]
        weights[rest] = weights.sum() / num_picked if num_picked else 1.0
    return weights
