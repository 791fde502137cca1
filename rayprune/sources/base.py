"""What every data source offers.

Shapes: N samples, B batch, H height, W width, C channels, F features, G groups.

Views of a source: its first rows, chosen rows, a stratified holdout.

Shapes: N samples, N' chosen, B batch.

How many classes the labels stand for.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rayprune.core.plan import block_rows
from rayprune.errors import DataError
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
            raise DataError(f"num_classes is {self.num_classes}: labels must be at least 0, and data.num_classes 1")

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
        raise DataError(
            f"{len(unknown)} sample ids are not in the source, first {named}: valid are 0..{num_samples - 1}"
        )


# With more classes than this the labels are numbers of something else.
MAX_LABEL = 2**31 - 1
SPARE_CLASSES, CLASSES_A_SAMPLE = 1_000, 10


def count_classes(labels: np.ndarray, named: str, given: int | None) -> int:
    """Return the number of classes: the one given, else the largest label + 1.

    Args:
        labels: (N,) integers of any width, N at least 1.
        named: where they come from, for messages.
        given: data.num_classes.

    Raises:
        ValueError: the labels are too large, or too sparse to be numbered classes.
    """
    largest = int(labels.max())
    if largest > MAX_LABEL:
        raise DataError(f"{named} holds {largest}: labels must be below 2**31, number the classes from 0")
    if given is None and largest + 1 > CLASSES_A_SAMPLE * len(labels) + SPARE_CLASSES:
        raise DataError(
            f"{named} look like ids, no labels: the largest of {len(labels)} is {largest}; number the classes from 0, "
            "name another column or set data.num_classes"
        )
    return largest + 1 if given is None else given


class Limited(SampleSource):
    """The first samples of a source.

    A limit that cuts nothing keeps the source's fingerprint, so that scores of the whole source still fit.

    Args:
        source: any source.
        num_samples: at least 1; more than the source holds means all of them.

    Raises:
        ValueError: num_samples is below 1.
    """

    def __init__(self, source: SampleSource, num_samples: int) -> None:
        if num_samples < 1:
            raise DataError(f"data.limit is {num_samples}: set it to at least 1, or leave it out for all samples")
        self._source = source
        self._num_samples = min(num_samples, len(source))

    def __len__(self) -> int:
        return self._num_samples

    @property
    def schema(self) -> Schema:
        return self._source.schema

    @property
    def fingerprint(self) -> str:
        whole = self._num_samples == len(self._source)
        return self._source.fingerprint if whole else digest("limited", self._source.fingerprint, self._num_samples)

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[: self._num_samples]

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        return self._source.read(ids)

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        return None if groups is None else np.append(groups[groups < self._num_samples], self._num_samples)

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return self._source.row_cost

    def prepare(self) -> None:
        self._source.prepare()


class Subset(SampleSource):
    """Chosen rows of a source, in the order given: id i is row `rows[i]`.

    Args:
        source: any source.
        rows: (N',) int64 ids of the source.

    Raises:
        ValueError: a row is not in the source.
    """

    def __init__(self, source: SampleSource, rows: np.ndarray) -> None:
        check_ids(rows, len(source))
        self._source = source
        self._rows = np.ascontiguousarray(rows, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Ascending rows, which is what a holdout makes, travel as one bit a row: pickles go out with every read task.
        if not self._ascending:
            return {"source": self._source, "rows": self._rows}
        chosen = np.zeros(len(self._source), dtype=bool)
        chosen[self._rows] = True
        return {"source": self._source, "bits": np.packbits(chosen)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._source = state["source"]
        self._rows = state["rows"] if "rows" in state else np.flatnonzero(np.unpackbits(state["bits"])).astype(np.int64)

    @property
    def _ascending(self) -> bool:
        return bool((np.diff(self._rows) > 0).all())

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def schema(self) -> Schema:
        return self._source.schema

    @property
    def fingerprint(self) -> str:
        return digest("subset", self._source.fingerprint, self._rows)

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[self._rows]

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self._rows))
        return self._source.read(self._rows[ids])

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        if groups is None or not self._ascending:
            return None
        return np.unique(np.searchsorted(self._rows, groups)).astype(np.int64)

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return self._source.row_cost

    def prepare(self) -> None:
        self._source.prepare()


def holdout(source: SampleSource, fraction: float, seed: int) -> Splits:
    """Split off a stratified validation part.

    Classes share `round(fraction · N)` (at least 1) validation samples in proportion, by largest remainder; every
    class keeps a training sample, so a class with a single one is never held out. Both parts keep the source's order.

    Args:
        source: any source with N samples.
        fraction: validation share, above 0 and below 1.
        seed: of `numpy.random.default_rng`.

    Returns:
        Both parts; validation is None where no class has two samples.

    Raises:
        ValueError: the fraction is outside its range.
    """
    if not 0 < fraction < 1:
        raise DataError(f"validation_fraction is {fraction}: it must be above 0 and below 1")
    labels = source.labels
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _quotas(counts, fraction)
    if quotas.sum() == 0:
        return Splits(source, None)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        held[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return Splits(Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held)))


def _quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    total = max(1, round(fraction * int(counts.sum())))
    shares = fraction * counts
    quotas = np.minimum(np.floor(shares).astype(np.int64), counts - 1)
    for position in np.argsort(quotas - shares, kind="stable"):
        if quotas.sum() < total and quotas[position] < counts[position] - 1:
            quotas[position] += 1
    return np.asarray(quotas)
