"""The control arm: any method with its scores permuted across samples.

It prunes as much as the inner method, by the same rule and with the same weights, but the scores belong to other
samples. The inner method's gain over this arm is the value of its scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import Ids, ScoreTable, Signals
from rayprune.errors import ConfigError
from rayprune.methods.registry import build_method, register

_PERMUTATION = 2  # keeps the permutation's generator apart from the inner method's


@register("shuffled")
@dataclass(frozen=True)
class Shuffled(Method):
    """Select by another method's rule on scores that are permuted anew in every epoch.

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
        # The inner method's class attributes become the instance's own.
        for name in ("signals", "unbiased", "fixed", "needs_labels", "sweep_signals", "sweep_part"):
            object.__setattr__(self, name, getattr(inner, name))
        object.__setattr__(self, "class_floor", max(self.class_floor, inner.class_floor))

    @property
    def _inner(self) -> Method:
        return self.of  # type: ignore[no-any-return]

    def columns(self) -> Mapping[str, Any]:
        return self._inner.columns()

    @property
    def collect_epochs(self) -> int:
        return self._inner.collect_epochs

    def step(self) -> tuple[str, dict[str, Any]]:
        return self._inner.step()

    def check(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> NDArray[np.bool_] | None:
        return self._inner.check(table, ids, signals, epoch)

    def fold(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        self._inner.fold(table, ids, signals, epoch)

    def fold_sweep(self, table: ScoreTable, ids: Ids, signals: Signals, epoch: int) -> None:
        self._inner.fold_sweep(table, ids, signals, epoch)

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Select on a permuted copy of the table; a fixed subset keeps one permutation."""
        rng = context.derived_rng(_PERMUTATION, epoch=0 if self.fixed else None)
        return self._inner.select(table.permuted(rng.permutation(len(table))), context)

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        return self._inner.scores(table)
