"""What every data source offers.

Shapes: N samples, B batch, H height, W width, C channels, F features, G groups.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rayprune.core.plan import block_rows
from rayprune.sources.fingerprint import digest


@dataclass(frozen=True)
class Column:
    """Shape and NumPy dtype name of one column, without the batch axis."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Schema:
    """What `take` returns.

    Attributes:
        columns: every column by name; where there are classes, the input column and `label` (int64) are among them.
        input: name of the input column: `image` (H, W, C) uint8 or `features` (F,) float32; empty where the columns
            are a training loop's own business.
        num_classes: labels lie in 0..num_classes-1; None where samples have no class.
        class_names: one name a class, or empty.

    Raises:
        ValueError: num_classes is below 1.
    """

    columns: Mapping[str, Column]
    input: str = ""
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}: labels must be at least 0, and data.num_classes 1")

    @property
    def row_bytes(self) -> int:
        """The bytes of one decoded row."""
        return sum(math.prod(column.shape) * np.dtype(column.dtype).itemsize for column in self.columns.values())


class SampleSource(abc.ABC):
    """Labelled samples that are read by id, 0..N-1.

    An implementation pickles into paths and settings rather than data, opens its files in the process that reads,
    and lets several threads call `take` at once.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of samples, N."""

    @property
    @abc.abstractmethod
    def schema(self) -> Schema:
        """The columns that `take` returns."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hex name of these samples: changes with their order, labels or content size, never with where they lie."""

    @property
    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """All labels, (N,) int64.

        Raises:
            ValueError: samples have no class.
        """

    @abc.abstractmethod
    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Read samples.

        Args:
            ids: (B,) int64 in 0..N-1, in any order, repeats allowed.

        Returns:
            The schema's columns, each with B C-contiguous rows in the order asked for.

        Raises:
            ValueError: an id is not in the source.
        """

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Read samples as `take` does, and count the bytes that came from storage; by default those of the rows."""
        columns = self.take(ids)
        return columns, sum(column.nbytes for column in columns.values())

    @property
    def groups(self) -> np.ndarray | None:
        """Boundaries (G+1,) int64, from 0 to N, of rows that are read together; None where random access is free."""
        return None

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        """`cheap` for rows copied from memory or a memory map, `expensive` for rows decoded at every `take`."""
        return "cheap"

    def prepare(self) -> None:  # noqa: B027  # most sources have nothing to prepare
        """Do once, before training, what is expensive (decoding into a cache); `take` works without it too."""


@dataclass(frozen=True)
class Splits:
    """A training source, and a validation source where there is one."""

    train: SampleSource
    validation: SampleSource | None

    @property
    def by_name(self) -> dict[str, SampleSource]:
        """The sources there are, as "train" and "validation"."""
        return {"train": self.train, **({"validation": self.validation} if self.validation is not None else {})}


def shuffle_name(source: SampleSource) -> str:
    """Return what a plan's order depends on besides ids and seed: "" or a digest of the source's windows."""
    groups = source.groups
    return "" if groups is None else digest("windows", groups, block_rows(source.schema.row_bytes))


def check_ids(ids: np.ndarray, num_samples: int) -> None:
    """Refuse ids that are not in 0..num_samples-1.

    Raises:
        ValueError: some are not; the first five are named.
    """
    unknown = ids[(ids < 0) | (ids >= num_samples)]
    if len(unknown):
        named = ", ".join(str(int(sample)) for sample in unknown[:5])
        raise ValueError(
            f"{len(unknown)} sample ids are not in the source, first {named}: valid are 0..{num_samples - 1}"
        )
