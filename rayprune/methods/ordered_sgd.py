"""Ordered SGD: train on the q highest losses of every batch.

Kawaguchi, Lu, "Ordered SGD: A New Stochastic Optimization Framework for Empirical Risk Minimization", AISTATS 2020,
arXiv 1907.04371. A step follows the mean of the q highest losses of its batch of s rows. q falls as the training
accuracy rises: s, s/2, s/4, s/8, s/16 from 0, 80, 90, 95 and 99.5 % on. While q = s the step is a plain one.

How the accuracy is known: it is the share of samples that were correct at their last visit, when the epoch begins. So
it lags behind the network, and q is the same in all steps of an epoch; epoch 0 has q = s.

Deliberate deviations: the chosen rows go through the network a second time (in the paper, the gradient comes from the
one forward pass), so batch normalization uses their own statistics, and dropout draws anew. Candidates are scored in
train mode, as there; the running statistics move in the second pass only. q is B − floor((1 − share)·B), at least 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayprune.core.bases.in_batch import BatchContext, InBatchMethod, Picked, StepContext, num_picked
from rayprune.core.draws import highest
from rayprune.core.method import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("ordered_sgd")
@dataclass(frozen=True)
class OrderedSGD(InBatchMethod):
    """Train on the highest losses of every batch, on fewer of them as the training accuracy rises.

    Args:
        accuracies: ascending training accuracies in (0, 1] at which the share of a batch changes.
        shares: the share of a batch to train on, in (0, 1], below the first accuracy and from each of them on.
    """

    keeps = "the highest losses of every batch"
    paper = "Kawaguchi, Lu, AISTATS 2020, arXiv 1907.04371"
    signals = ("loss", "correct")
    candidates_in_eval_mode = False

    accuracies: tuple[float, ...] = (0.8, 0.9, 0.95, 0.995)
    shares: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625)

    def __post_init__(self) -> None:
        super().__post_init__()
        ascending = list(self.accuracies) == sorted(set(self.accuracies))
        if not ascending or not all(0 < accuracy <= 1 for accuracy in self.accuracies):
            raise ConfigError(f"accuracies {self.accuracies} must ascend in (0, 1]")
        if len(self.shares) != len(self.accuracies) + 1 or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(
                f"shares {self.shares} must be in (0, 1], one more than the {len(self.accuracies)} accuracies"
            )

    def share(self, accuracy: float) -> float:
        """Return the share of a batch to train on at a training accuracy.

        >>> OrderedSGD().share(0.79), OrderedSGD().share(0.9), OrderedSGD().share(1.0)
        (1.0, 0.25, 0.0625)
        """
        return self.shares[sum(accuracy >= each for each in self.accuracies)]

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Keep all samples, and note the training accuracy and the share of a batch that follows from it."""
        correct = table["correct"]
        known = correct[~np.isnan(correct)]
        accuracy = float(known.mean(dtype=np.float64)) if known.size else 0.0
        return super().select(table, context).with_facts(last_accuracy=accuracy, share=self.share(accuracy))

    def picks(self, context: StepContext) -> bool:
        return bool(context.facts["share"] < 1.0)

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        return np.flatnonzero(highest(signals["loss"], num_picked(context.facts["share"], context.num_rows))), None
