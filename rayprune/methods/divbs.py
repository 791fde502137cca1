"""DivBS: train on rows of every batch whose gradients together span its mean gradient.

Hong et al., "Diversified Batch Selection for Training Acceleration", ICML 2024, arXiv 2406.04872. g_i is the gradient
of row i's loss with respect to the last layer. The residual r starts as the mean gradient. A row is drawn with
probability ∝ |⟨g_i, r⟩|; the part of its gradient that is orthogonal to those drawn before, scaled to length 1, is q;
r ← r − ⟨q, r⟩ q. When r is 0, the rest is drawn uniformly. Gradients are not normalized; weights are 1. The paper takes
a tenth of batches of 320 (set train.batch_size), scored in eval mode, as here.

The gradient of the last layer is (p − onehot(y)) ⊗ (h, 1) with its inputs h, so that ⟨g_i, g_j⟩ is a product of two
small ones, and no (B, C·D) array is needed. With `gradient: logits` h is left out: cheaper, but p − onehot(y) has only
C − 1 independent directions, so at most C − 1 rows are drawn by diversity and the others uniformly.

Ours: M is B − floor((1 − keep)·B); a gradient whose orthogonal part is below 1e-5 of its length counts as dependent;
label smoothing does not enter the gradients. `deterministic` takes the largest |⟨g_i, r⟩| instead of a draw, the lower
id in ties.

Shapes: B candidates, C classes, D inputs of the last layer and 1, M chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.in_batch import BatchContext, InBatchMethod, Picked, check_keep, num_picked
from rayprune.core.table import Ids, Signals
from rayprune.methods.registry import register

# Of squared lengths and of products: below it, what is left of them is rounding.
_ZERO = 1e-10


@register("divbs")
@dataclass(frozen=True)
class DivBS(InBatchMethod):
    """Train on rows of every batch that are drawn so that their gradients are diverse.

    Args:
        keep: the share of a batch to train on, in (0, 1].
        gradient: the whole last layer's, or the one with respect to the logits alone, which with few classes leaves
            most rows to chance.
        deterministic: take the largest product instead of a draw.
    """

    keeps = "diverse gradients in every batch"
    paper = "Hong et al., ICML 2024, arXiv 2406.04872"
    batch_signals = ("logit_gradient", "embedding")

    keep: float = 0.1
    gradient: Literal["last_layer", "logits"] = "last_layer"
    deterministic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)
        if self.gradient == "logits":
            object.__setattr__(self, "batch_signals", ("logit_gradient",))

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        errors = signals["logit_gradient"].astype(np.float64)
        inputs = np.ones((context.num_rows, 1))
        if self.gradient == "last_layer":
            inputs = np.hstack([signals["embedding"].astype(np.float64), inputs])
        count = num_picked(self.keep, context.num_rows)
        rows = span_mean(errors, inputs, count, context.rng, deterministic=self.deterministic)
        rest = context.rng.permutation(np.setdiff1d(np.arange(context.num_rows), rows))
        return np.concatenate([rows, rest[: count - rows.size]]), None


def span_mean(
    errors_BC: NDArray[np.float64],
    inputs_BD: NDArray[np.float64],
    count: int,
    rng: np.random.Generator,
    *,
    deterministic: bool = False,
) -> Ids:
    """Draw rows whose gradients errors ⊗ inputs span the mean gradient; fewer than `count` if the residual gets 0."""
    mean_CD = errors_BC.T @ inputs_BD / len(errors_BC)
    products_B = ((errors_BC @ mean_CD) * inputs_BD).sum(axis=1)  # ⟨g_i, r⟩
    squares_B = (errors_BC**2).sum(axis=1) * (inputs_BD**2).sum(axis=1)
    left_B = squares_B.copy()  # of each gradient, the squared length of what is orthogonal to the drawn ones
    lengths_B, residual = np.sqrt(squares_B), np.linalg.norm(mean_CD)
    units_MB = np.empty((count, len(errors_BC)))  # ⟨q_m, g_i⟩
    rows = np.empty(count, dtype=np.int64)
    for place in range(count):
        is_zero = (left_B <= _ZERO * squares_B) | (np.abs(products_B) <= _ZERO * lengths_B * residual)
        odds_B = np.where(is_zero, 0.0, np.abs(products_B))
        if not odds_B.any():
            return rows[:place]
        row = int(odds_B.argmax()) if deterministic else int(rng.choice(odds_B.size, p=odds_B / odds_B.sum()))
        gram_B = (errors_BC @ errors_BC[row]) * (inputs_BD @ inputs_BD[row])
        length = np.sqrt(left_B[row])
        units_MB[place] = (gram_B - units_MB[:place].T @ units_MB[:place, row]) / length
        products_B = products_B - products_B[row] / length * units_MB[place]
        left_B = np.maximum(left_B - units_MB[place] ** 2, 0.0)
        left_B[row], rows[place] = 0.0, row
    return rows
