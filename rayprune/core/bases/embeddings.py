"""Base classes of static methods that choose by the embeddings of a forward-only pass.

`EmbeddingMethod` collects the embeddings, condenses them to columns when the pass is complete, and checks that it did.
Combine it with `ScoredMethod` for a score that does not depend on the number kept. `RankedMethod` is for rules that
choose the samples with the embeddings at hand; another prune_ratio then needs another scoring run.

Shapes: N samples, d numbers of an embedding, M kept.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.geometry import Points
from rayprune.core.algorithms.greedy import at_random, by_class
from rayprune.core.bases.static import StaticMethod
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable
from rayprune.core.vectors import SWEEP_CURE, Storage, VectorColumn
from rayprune.errors import ConfigError

Quota = Literal["none", "proportional", "even"]

_DRAW = 3  # keeps the generator of `condense` apart from that of the selection


@dataclass(frozen=True)
class EmbeddingMethod(StaticMethod):
    """Condense the embeddings of all samples to columns; the base of methods with a VectorColumn.

    Class attributes:
        condensed: the float32 columns that `condense_embeddings` writes.

    Args:
        storage: how the embeddings are stored on the disk: float32, or float16 in half the space.
    """

    sweep_signals: ClassVar[tuple[str, ...]] = ("embedding",)
    condensed: ClassVar[tuple[str, ...]] = ()

    _: KW_ONLY
    storage: Storage = "float32"

    def columns(self) -> Mapping[str, Any]:
        """Return the columns of the signals, the embeddings apart from the table, and the condensed columns."""
        floats = dict.fromkeys(self.condensed, np.float32)
        return {**super().columns(), "embedding": VectorColumn(self.storage), **floats}

    @abc.abstractmethod
    def condense_embeddings(
        self, embeddings: NDArray[Any], table: ScoreTable, context: EpochContext
    ) -> dict[str, NDArray[Any]]:
        """Return the condensed columns, (N,) each, of (N, d) embeddings; a pure function."""

    def condense(self, table: ScoreTable, context: EpochContext) -> None:
        """Write the condensed columns."""
        self._check_swept(table, context.epoch, condensed=False)
        for name, values in self.condense_embeddings(table.vectors["embedding"].array, table, context).items():
            table[name][:] = values

    def draw(self, context: EpochContext) -> np.random.Generator:
        """Return the generator of `condense_embeddings`."""
        return context.derived_rng(_DRAW, self.collect_epochs - 1)

    def _check_swept(self, table: ScoreTable, epoch: int, *, condensed: bool = True) -> None:
        super()._check_swept(table, epoch)
        for name in self.condensed if condensed else ():
            column = table[name]
            if np.isnan(column).any() if column.dtype.kind == "f" else not column.any():
                raise ConfigError(f"epoch {epoch}: the {column.size} samples have no embedding: {SWEEP_CURE}")


@dataclass(frozen=True)
class RankedMethod(EmbeddingMethod):
    """Keep the samples that a greedy rule takes, one after the other; a subclass defines `order`.

    Args:
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        balance: `proportional` applies the rule to each class and keeps the same share of it, `even` the same number;
            `none` ignores classes.
        parts: apply the rule to so many random parts of the samples (of each class, with a balance), each with its
            share of the number kept; null takes 1 unless that would take too long.
    """

    condensed = ("rank",)
    selection_fields = ("class_floor",)
    # Multiplications in one condensation; above, `parts` null takes several parts.
    max_work: ClassVar[float] = 1e14

    score_epochs: int = 10
    _: KW_ONLY
    balance: Quota = "none"
    parts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts is not None and self.parts < 1:
            raise ConfigError(f"parts {self.parts} must be at least 1, or null")
        object.__setattr__(self, "needs_labels", self.balance != "none")

    @property
    def collect_epochs(self) -> int:
        """T."""
        return self.score_epochs

    def columns(self) -> Mapping[str, Any]:
        """Return the columns of the signals, the embeddings apart from the table, and the rank."""
        return {**super().columns(), "rank": np.int32}

    @abc.abstractmethod
    def order(self, points: Points, count: int, values: NDArray[np.float64]) -> Ids:
        """Return `count` positions among n points in the order in which the rule takes them, by (n,) `values`."""

    def orders(self, points: Points, shares: list[tuple[Ids, int]], values: NDArray[np.float64]) -> Iterator[Ids]:
        """Yield the positions taken from each share of the points, in order."""
        for positions, count in shares:
            yield positions[self.order(points.subset(positions), count, values[positions])]

    def work(self, size: int, count: int, width: int) -> float:
        """Return the multiplications for `count` of `size` samples in one part, about."""
        return float(size) * count * width

    def values(self, table: ScoreTable) -> NDArray[np.float64]:
        """Return what the rule uses besides the embeddings, (N,)."""
        return np.broadcast_to(np.float64(0.0), len(table))

    def candidates(self, values: NDArray[np.float64]) -> Ids:
        """Return the ascending ids of the samples that may be kept."""
        return np.arange(values.size)

    def condense_embeddings(
        self, embeddings: NDArray[Any], table: ScoreTable, context: EpochContext
    ) -> dict[str, NDArray[Any]]:
        """Return the rank: the place of each kept sample in the order of its class and part, from 1; 0 for others."""
        rank, values, rng = np.zeros(len(table), dtype=np.int32), self.values(table), self.draw(context)
        groups = by_class(self.candidates(values), self.num_kept(len(table)), context.labels, self.balance)
        work = sum(self.work(ids.size, count, embeddings.shape[1]) for ids, count in groups)
        num_parts = self.parts or max(1, math.ceil(work / self.max_work))
        for ids, count in groups:
            points = Points(embeddings, ids)
            for positions in self.orders(points, at_random(ids.size, count, num_parts, rng), values[ids]):
                rank[ids[positions]] = np.arange(1, positions.size + 1)
        return {"rank": rank}

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Return the ranked samples.

        Raises:
            ConfigError: they were ranked for another number.
        """
        ids = np.flatnonzero(table["rank"])
        if ids.size != count:
            raise ConfigError(
                f"the scoring run ranked {ids.size} samples, not {count}: score again with this prune_ratio"
            )
        return ids, None, {"score": f"{self.name}_priority"}

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the priority: 1 for the last sample taken and higher for earlier ones; NaN for those not kept."""
        rank = table["rank"].astype(np.float32)
        return {f"{self.name}_priority": np.where(rank > 0, rank.max(initial=0.0) + 1.0 - rank, np.float32(np.nan))}
