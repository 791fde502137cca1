"""The control arm: any method with its scores permuted across samples.

It prunes as much as the inner method, by the same rule, with the same weights, but its scores belong to other samples.
What the inner method gains over this arm is what the scores are worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.selection import Selection
from rayprune.core.selector import EpochContext
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.base import Method
from rayprune.methods.registry import build_method, register

_PERMUTATION = 2  # keeps the permutation's generator apart from the one that the inner method draws from


@register("shuffled")
@dataclass(frozen=True)
class Shuffled(Method):
    """Select by another method's rule on scores permuted anew in every epoch.

    Args:
        of: the inner method, a Method or its config such as `{name: infobatch, prune_ratio: 0.5}`.
    """

    kind = "control"
    paper = "control: permuted scores"

    of: Any = "infobatch"

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = build_method(self.of, "method.of")
        if inner.name == "fixed":
            raise ConfigError("method.of = fixed has no scores to permute: use {name: random, prune_ratio: …} instead")
        object.__setattr__(self, "of", inner)
        # What the inner method is holds for the wrapper: class attributes become the instance's own.
        for name in ("signals", "unbiased", "fixed", "needs_labels", "sweep_signals", "sweep_part"):
            object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "class_floor", max(self.class_floor, inner.class_floor))

    def columns(self) -> Mapping[str, Any]:
        """Return the inner method's columns."""
        return self.of.columns()  # type: ignore[no-any-return]

    @property
    def collect_epochs(self) -> int:
        """As many as the inner method's."""
        return self.of.collect_epochs  # type: ignore[no-any-return]

    def step(self) -> tuple[str, dict[str, Any]]:
        """Return the inner method's step."""
        return self.of.step()  # type: ignore[no-any-return]

    def check(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> NDArray[np.bool_] | None:
        """Check as the inner method does."""
        return self.of.check(table, ids, signals, epoch)  # type: ignore[no-any-return]

    def fold(self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int) -> None:
        """Fold as the inner method does: the stored scores stay with their samples."""
        self.of.fold(table, ids, signals, epoch)

    def fold_sweep(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> None:
        """Fold as the inner method does."""
        self.of.fold_sweep(table, ids, signals, epoch)

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Select on a permuted copy of the table; a fixed subset keeps one permutation."""
        draw = context.derived_rng(_PERMUTATION, epoch=0 if self.fixed else None)
        return self.of.select(table.permuted(draw.permutation(len(table))), context)  # type: ignore[no-any-return]

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the inner method's scores."""
        return self.of.scores(table)  # type: ignore[no-any-return]
