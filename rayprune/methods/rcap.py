"""RCAP: give classes with high losses more samples, and draw the samples of a class by their losses.

Hassan, Khare, Paik, "RCAP: Robust, Class-Aware, Probabilistic Dynamic Dataset Pruning", UAI 2025, arXiv 2606.11761.
Class c gets a number in proportion to sqrt(L_c·π_c), with the mean loss L_c and the share π_c of the class, at most its
size. Inside a class the samples are drawn without replacement with p_i ∝ exp(clip(l_i, 0, ln C)/β), where ln C is the
loss of a uniform prediction and β is between 1/3 and 3. Weights are 1: biased.

Deliberate deviation from the reference program: what full classes cannot take is divided among the others until the
numbers add up to exactly M (there, the whole budget is divided again, which overshoots). Ours: β = 1; C counts the
labels up to the largest one; samples without a loss come first in their class, and a class without any has the mean
loss of all; a negative mean loss counts as 0; classes of loss 0 share what the others cannot take by size; all samples
are used in epoch 0; an optional annealing phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.dynamic import PruneRatioMethod
from rayprune.core.choosing import capped_quotas
from rayprune.core.draws import draw_keys, highest_by_class
from rayprune.core.method import EpochContext
from rayprune.core.table import ScoreTable, chunks
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("rcap")
@dataclass(frozen=True)
class RCAP(PruneRatioMethod):
    """Draw more samples of the classes with high losses, and by their losses inside a class.

    Args:
        prune_ratio: r, the share of all samples to drop; a number in [0, 1) or a schedule.
        beta: β above 0, the temperature of the draw inside a class; higher is more uniform.
        anneal_start: δ in [0, 1]; from epoch floor(δE) on the run trains on all samples; 1 = never.
    """

    keeps = "a draw by loss; more of hard classes"
    paper = "Hassan et al., UAI 2025, arXiv 2606.11761"
    needs_labels = True

    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0.0:
            raise ConfigError(f"beta {self.beta!r} must be above 0: 1/3 to 3 is recommended")

    def choose(self, table: ScoreTable, context: EpochContext, count: int) -> NDArray[np.bool_]:
        """Divide the count among the classes, then draw in each."""
        assert context.labels is not None  # the Selector refuses to start without labels
        loss, labels = table["loss"], context.labels
        sizes, losses = class_losses(loss, labels)
        quotas = capped_quotas(sizes, np.sqrt(np.maximum(losses, 0.0) * sizes), count)
        log_weights = np.clip(loss, 0.0, np.float32(math.log(sizes.size))) / np.float32(self.beta)
        return highest_by_class(draw_keys(log_weights, context.rng), labels, quotas)


def class_losses(
    loss: NDArray[np.float32], labels: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the size and the mean loss of each class, (C,); for a class without losses, the mean of all.

    >>> class_losses(np.array([1.0, 2.0, np.nan, np.nan], dtype=np.float32), np.array([0, 0, 0, 1]))
    (array([3, 1]), array([1.5, 1.5]))
    """
    num_classes = int(labels.max()) + 1
    sizes, (known, sums) = np.zeros(num_classes, dtype=np.int64), np.zeros((2, num_classes))
    for rows in chunks(loss.size):
        some, of = ~np.isnan(loss[rows]), labels[rows]
        sizes += np.bincount(of, minlength=num_classes)
        known += np.bincount(of[some], minlength=num_classes)
        sums += np.bincount(of[some], weights=loss[rows][some], minlength=num_classes)
    return sizes, np.where(known > 0, sums / np.maximum(known, 1), sums.sum() / max(known.sum(), 1))
