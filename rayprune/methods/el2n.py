"""EL2N: keep the samples with the largest errors early in training.

Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet: Finding Important Examples Early in Training", NeurIPS 2021,
arXiv 2107.07075. The score is ‖p − onehot(y)‖₂ with a sample's probabilities p at its training visits, averaged over
the epochs first_epoch … last_epoch − 1.

Programs differ in the epochs: that of CCS (arXiv 2210.15809) sums epochs 0 … 9, that of DUAL (arXiv 2502.06905) takes
epoch 20 alone. The defaults are those of CCS, up to its factor 10: one epoch of one network is a noisy score, which the
paper averages over ten networks (`collect.runs`), and ten epochs of one network cost less. For epoch 20 alone, set
first_epoch 20 and score_epochs 21.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayprune.core.bases.visits import MeanMethod
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("el2n")
@dataclass(frozen=True)
class EL2N(MeanMethod):
    """Keep the samples with the largest mean error ‖p − onehot(y)‖₂ in some of the first T epochs.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        first_epoch: the first epoch whose visits count, from 0.
        last_epoch: the epoch after the last one whose visits count, at most T; null = T.
    """

    keeps = "the largest errors early in training"
    paper = "Paul et al., NeurIPS 2021, arXiv 2107.07075"
    signals = ("el2n",)

    first_epoch: int = 0
    last_epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.mean_epochs.start, self.mean_epochs.stop
        if not 0 <= first < last <= self.score_epochs:
            raise ConfigError(
                f"first_epoch {first} and last_epoch {last} are no window of the epochs 0 to {self.score_epochs}: they "
                "must ascend; raise score_epochs for later ones"
            )

    @property
    def mean_epochs(self) -> range:
        """first_epoch … last_epoch − 1."""
        return range(self.first_epoch, self.score_epochs if self.last_epoch is None else self.last_epoch)
