"""What the core asks of a selection method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rayprune.core.context import EpochContext
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable


@runtime_checkable
class SelectionMethod(Protocol):
    """What the Selector needs of a method; `rayprune.methods.base.Method` is its implementation."""

    @property
    def class_floor(self) -> float: ...

    @property
    def signals(self) -> tuple[str, ...]: ...

    @property
    def sweep_signals(self) -> tuple[str, ...]: ...

    @property
    def fixed(self) -> bool: ...

    @property
    def needs_labels(self) -> bool: ...

    def to_config(self) -> dict[str, Any]: ...

    def columns(self) -> Mapping[str, Any]: ...

    def check(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> NDArray[np.bool_] | None: ...

    def fold(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> None: ...

    def fold_sweep(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> None: ...

    def select(self, table: ScoreTable, context: EpochContext) -> Selection: ...

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]: ...
