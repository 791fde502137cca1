"""D2: keep difficult samples that are spread over the embeddings, by messages between neighbors.

Maharana, Yadav, Bansal, "D2 Pruning: Message Passing for Balancing Diversity & Difficulty in Data Pruning", ICLR 2024,
arXiv 2310.07931. With the difficulty s_i ≥ 0, the k nearest neighbors N(i) of h, the last layer's inputs in a
forward-only pass after T epochs, and their Euclidean distances d_ij:
    forward  v_i = s_i + Σ_{j in N(i)} e^{−d_ij}·s_j
    reverse  keep i = argmax v, then v_j ← v_j − e^{−γ·d_ij}·v_i for all j in N(i), and so on
As in the authors' program the forward message has no γ. Its graph is directed where neighbors are computed beforehand
and symmetric otherwise, with other results; here it is directed.

By default s = max(AUM) − AUM, with AUM the mean of p_y − max_{c≠y} p_c over the visits. drop_hardest is the program's
"mis ratio" (0.4 at 10 % kept); k and γ are those of its examples.

Deviations: the program's negated AUM is at most 0, so that its messages change sign; it also draws from 25 strata of v,
each with a graph of its own, which we leave out, as the paper's algorithm does not have them. Ours: above 5·10^13
multiplications N²·d the samples are divided into P random parts with graphs of their own; the k nearest in a part are
k of about the k·P nearest of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points, nearest_neighbors
from rayprune.core.algorithms.greedy import highest_with_discounts
from rayprune.core.bases.embeddings import RankedMethod
from rayprune.core.choosing import num_pruned
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.core.validation import check_share
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("d2")
@dataclass(frozen=True)
class D2(RankedMethod):
    """Keep the samples of the highest difficulty after messages between neighbors.

    Args:
        prune_ratio: r, the share of all samples to drop, in [0, 1); not a schedule.
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
        balance: `proportional` applies the rule to each class, with a graph of its own, and keeps the same share of it,
            `even` the same number; `none` ignores classes.
        parts: P, random parts of the samples (of each class, with a balance) with graphs of their own; null is 1 up to
            5·10^13 multiplications N²·d.
        difficulty: s: `aum`, from all visits, or `el2n`, `entropy` or `grand` of the forward-only pass.
        neighbors: k ≥ 0.
        gamma: γ ≥ 0; a small one keeps neighbors of kept samples out at a larger distance.
        drop_hardest: share of all samples of the highest difficulty that are never kept, at most prune_ratio.
    """

    keeps = "difficult and not alike"
    paper = "Maharana et al., ICLR 2024, arXiv 2310.07931"
    signals = ("margin",)
    max_work = 5e13

    difficulty: Literal["aum", "el2n", "entropy", "grand"] = "aum"
    neighbors: int = 5
    gamma: float = 0.1
    drop_hardest: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("drop_hardest", self.drop_hardest)
        if self.drop_hardest > self.prune_ratio:
            raise ConfigError(f"drop_hardest {self.drop_hardest} is above prune_ratio {self.prune_ratio}: lower it")
        if self.neighbors < 0 or self.gamma < 0:
            raise ConfigError(f"neighbors {self.neighbors} and gamma {self.gamma} must be at least 0")
        if self.difficulty != "aum":
            object.__setattr__(self, "signals", ("loss",))
            object.__setattr__(self, "sweep_signals", ("embedding", self.difficulty))

    def columns(self) -> Mapping[str, Any]:
        """Return the sum and the number of the margins for the AUM, and the other columns."""
        sums = {"margin_sum": np.float32, "num_margins": np.int32} if self.difficulty == "aum" else {}
        return {name: spec for name, spec in super().columns().items() if name != "margin"} | sums

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_]:
        """Mask visits after the scoring run, and repeated ones."""
        new: NDArray[np.bool_] = table.last_visit[ids] != epoch
        return new & (epoch < self.collect_epochs)

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        """Add up the margins, or store the loss."""
        if self.difficulty != "aum":
            return super().fold(table, ids, signals, epoch)
        table["margin_sum"][ids] = np.where(table["num_margins"][ids], table["margin_sum"][ids], 0) + signals["margin"]
        table["num_margins"][ids] += 1
        return None

    def values(self, table: ScoreTable) -> NDArray[np.float64]:
        """Return s, (N,) at least 0.

        Raises:
            ConfigError: a sample has no margin of any visit.
        """
        if self.difficulty != "aum":
            return np.asarray(table[self.difficulty], dtype=np.float64)
        if (missing := np.flatnonzero(table["num_margins"] == 0)).size:
            raise ConfigError(f"{missing.size} samples (ids {missing[:5].tolist()}) have no margin: {self._visit_cure}")
        aum = np.asarray(table["margin_sum"], dtype=np.float64) / table["num_margins"]
        difficulties: NDArray[np.float64] = np.max(aum) - aum
        return difficulties

    def candidates(self, values: NDArray[np.float64]) -> Ids:
        """Return the ids of all but the hardest; of equally hard samples the higher ids are dropped."""
        order = np.argsort(values, kind="stable")
        return np.sort(order[: order.size - num_pruned(self.drop_hardest, order.size)])

    def work(self, size: int, count: int, width: int) -> float:
        """Return the multiplications of a search for all neighbors."""
        return float(size) * size * width

    def order(self, points: Points, count: int, values: NDArray[np.float64]) -> Ids:
        """Return the order of forward and reverse message passing."""
        near, distances = nearest_neighbors(points, self.neighbors)
        far = distances.astype(np.float64)
        forward = values + (np.exp(-far) * values[near]).sum(axis=1)
        starts = np.arange(len(points) + 1) * near.shape[1]
        discounts = np.exp(-self.gamma * far)
        return highest_with_discounts(forward, count, starts, near.ravel(), discounts.ravel(), relative=True)
