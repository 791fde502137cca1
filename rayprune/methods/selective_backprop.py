"""Selective-Backprop: train on the rows of every batch that a draw by their losses chooses.

Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019, arXiv 1910.00762. The B losses of a
batch are ranked, 0 the lowest; M rows are drawn one after the other, with probability ∝ ((rank + ½)/B)^(1/keep − 1).
With keep ½ that is the rank itself; with keep ⅓ its square.

The schedule is the one that Composer's implementation made usual: it starts at half of training and ends at nine
tenths, and every second batch in between is plain. Weights are 1: the gradient is biased to high losses.

Deliberate deviations from that implementation: candidates are scored in eval mode (there: in train mode, so that the
statistics of batch normalization move twice in a step); M is B − floor((1 − keep)·B) (there: rounded down); the draws
come from the run's seed (there: from NumPy's global generator); ties are ranked by id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.in_batch import (
    BatchContext,
    InBatchMethod,
    Picked,
    StepContext,
    check_keep,
    check_window,
    num_picked,
)
from rayprune.core.draws import draw_weighted
from rayprune.core.table import Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("selective_backprop")
@dataclass(frozen=True)
class SelectiveBackprop(InBatchMethod):
    """Train on rows of every batch that are drawn by the rank of their loss.

    Args:
        keep: the share of a batch to train on, in (0, 1].
        start: the share of training, in [0, 1], from which on batches are thinned.
        end: the share of training from which on they are whole again.
        interrupt: every so many batches of an epoch, one stays whole; 0 thins all of them.
    """

    keeps = "drawn in every batch, higher losses more often"
    paper = "Jiang et al., 2019, arXiv 1910.00762"

    keep: float = 0.5
    start: float = 0.5
    end: float = 0.9
    interrupt: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        check_window(self.start, self.end)
        if self.interrupt < 0 or self.interrupt == 1:
            raise ConfigError(f"interrupt {self.interrupt} must be 0 or at least 2: 1 would leave every batch whole")

    def picks(self, context: StepContext) -> bool:
        """Return whether the step lies in the window and is not an interrupting one."""
        is_whole = self.interrupt > 0 and (context.step + 1) % self.interrupt == 0
        return self.start <= context.progress < self.end and not is_whole

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        weights = rank_weights(signals["loss"], self.keep)
        return np.flatnonzero(draw_weighted(weights, num_picked(self.keep, context.num_rows), context.rng)), None


def rank_weights(losses: NDArray[np.floating], keep: float) -> NDArray[np.float64]:
    """Return the weights of the draw, ((rank + ½)/B)^(1/keep − 1), (B,).

    >>> rank_weights(np.array([0.1, 3.0, 2.0, 1.0]), 0.5).tolist()
    [0.125, 0.875, 0.625, 0.375]
    """
    ranks = np.empty(losses.size)
    ranks[np.argsort(losses, kind="stable")] = np.arange(losses.size)
    weights: NDArray[np.float64] = ((ranks + 0.5) / losses.size) ** (1.0 / keep - 1.0)
    return weights
