"""RHO-LOSS: train on the rows of every batch with the highest reducible loss.

Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022,
arXiv 2206.07137. The score is the row's loss minus its irreducible loss, that of a model which was trained on other
data and never saw the row: noisy rows have a high loss in both, redundant rows a low one in both. The M rows with the
highest scores learn, with weight 1. The paper takes a tenth of batches of 320 (set train.batch_size).

As in the paper, candidates are scored in eval mode, and irreducible losses do not change during training. Ours: M is
B − floor((1 − keep)·B); the lower id wins a tie; the loss is the training loss, with its label smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayprune.core.bases.in_batch import BatchContext, InBatchMethod, Picked, check_keep, num_picked
from rayprune.core.draws import highest
from rayprune.core.table import Signals
from rayprune.methods.registry import register


@register("rho")
@dataclass(frozen=True)
class RHOLoss(InBatchMethod):
    """Train on the rows of every batch with the highest loss minus irreducible loss.

    Args:
        irreducible: a file with the irreducible loss of every training sample: Parquet, CSV with a column `id`, or the
            folder of a run; in a config, relative paths start at the folder of the command. Required.
        column: the name of the losses in the file; null for the only score there.
        keep: the share of a batch to train on, in (0, 1].
    """

    keeps = "the highest reducible losses of every batch"
    paper = "Mindermann et al., ICML 2022, arXiv 2206.07137 (RHO-LOSS)"
    path_fields = ("irreducible",)

    irreducible: str = ""
    column: str | None = None
    keep: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep)

    def file_columns(self) -> Mapping[str, tuple[str, str | None]]:
        return {"irreducible": (self.irreducible, self.column)}

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        reducible = signals["loss"].astype(np.float64) - context.columns["irreducible"]
        return np.flatnonzero(highest(reducible, num_picked(self.keep, context.num_rows))), None
