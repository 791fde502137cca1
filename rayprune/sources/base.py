"""The contract of a data source, a base class for implementations, and views of a source.

Shapes: N samples, N' chosen samples, B batch, H height, W width, C channels, F features, G groups.
"""

from __future__ import annotations

import abc
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from rayprune.core.plan import block_rows
from rayprune.errors import ConfigError, DataError
from rayprune.sources.fingerprint import digest

RowCost = Literal["cheap", "expensive"]
RESERVED_NAMES = frozenset({"id", "weight"})  # of the columns that are added to every batch


@dataclass(frozen=True)
class Column:
    """Shape and NumPy dtype name of one column, without the batch axis.

    Rows of a column need not have one shape. `take` then returns them as a (B,) object array.

    Attributes:
        shape: -1 for an axis whose length differs from row to row: unpadded token ids are `Column((-1,), "int64")`.
        dtype: of a row's numbers; `object` for text and other Python objects.
        mean_bytes: an estimate of the bytes of a row that is ragged or a Python object.
    """

    shape: tuple[int, ...]
    dtype: str
    mean_bytes: int = field(default=0, compare=False)

    @property
    def is_ragged(self) -> bool:
        """Whether the rows are arrays of several shapes."""
        return -1 in self.shape

    @property
    def in_objects(self) -> bool:
        """Whether `take` returns an object array: of arrays if ragged, else of text or other Python objects."""
        return self.is_ragged or self.dtype == "object"

    @property
    def row_bytes(self) -> int:
        """The bytes of one row."""
        return self.mean_bytes if self.in_objects else math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Schema:
    """The columns that `take` returns.

    Sources of `rayprune train` deliver an input column and `label`. Data that `prune` and `local_loader` are given keep
    their own columns.

    Attributes:
        columns: every column by name; with classes, the input column and `label` (int64) are among them.
        input: name of the input column: `image` (H, W, C) uint8, whatever the order of the axes was in the data, or
            `features` (F,) float32; empty if only the user's training loop knows the meaning of the columns. Their
            axes are then in the order of the data; encoded and Pillow images are decoded to (H, W, C) uint8.
        num_classes: labels are in 0..num_classes-1; None if samples have no class.
        class_names: one name per class, or empty.

    Raises:
        DataError: num_classes is below 1.
    """

    columns: Mapping[str, Column]
    input: str = ""
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise DataError(f"num_classes is {self.num_classes}: labels must be at least 0, and data.num_classes 1")

    @classmethod
    def for_classification(
        cls, input_name: str, shape: tuple[int, ...], num_classes: int, class_names: Sequence[str] = ()
    ) -> Schema:
        """Return the schema of labeled images, (H, W, C), or features, (F,).

        The class names are ignored unless there is one per class.
        """
        dtype = "uint8" if input_name == "image" else "float32"
        columns = {input_name: Column(shape, dtype), "label": Column((), "int64")}
        return cls(columns, input_name, num_classes, tuple(class_names) if len(class_names) == num_classes else ())

    @property
    def row_bytes(self) -> int:
        """The bytes of one decoded row."""
        return sum(column.row_bytes for column in self.columns.values())


class SampleSource(abc.ABC):
    """Labeled samples that are read by id, 0..N-1.

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
        """Hex digest of the samples: changes with their order, labels or content size, never with their location."""

    @property
    @abc.abstractmethod
    def labels(self) -> np.ndarray:
        """All labels, (N,) int64.

        Raises:
            DataError: samples have no class.
        """

    @abc.abstractmethod
    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Read samples.

        Args:
            ids: (B,) int64 in 0..N-1, in any order, repeats allowed.

        Returns:
            The schema's columns, each with B C-contiguous rows in the order of the ids. Ragged rows and Python objects
            are a (B,) object array.

        Raises:
            DataError: an id is not in the source.
        """

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Read samples as `take` does, and count the bytes that came from storage; by default those of the rows."""
        columns = self.take(ids)
        return columns, sum(column.nbytes for column in columns.values())

    @property
    def groups(self) -> np.ndarray | None:
        """Boundaries (G+1,) int64, from 0 to N, of rows that are read together; None if random access is free."""
        return None

    @property
    def row_cost(self) -> RowCost:
        """`cheap` if rows are copied from memory or a memory map, `expensive` if every `take` decodes them."""
        return "cheap"

    def prepare(self) -> None:  # noqa: B027  # most sources have nothing to prepare
        """Do expensive work, such as decoding into a cache, once before training; `take` also works without it."""


class DescribedSource(SampleSource):
    """Base class of sources whose length, schema and fingerprint are known once they are constructed.

    A subclass implements `take`, or `read` if it counts the bytes itself. Labels are read when they are first needed.
    Pickled copies drop them, and every other attribute that `process_local` names; in the copy these are None until it
    reads them again.

    Args:
        num_samples: N.
        schema, fingerprint: as returned.
        labels: (N,) int64, if they have been read already.
    """

    process_local: ClassVar[tuple[str, ...]] = ("_labels",)

    def __init__(self, num_samples: int, schema: Schema, fingerprint: str, labels: np.ndarray | None = None) -> None:
        self._num_samples = num_samples
        self._schema = schema
        self._fingerprint = fingerprint
        self._labels = labels
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        dropped = {"_lock", *self.process_local}
        return {name: value for name, value in vars(self).items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(dict.fromkeys(self.process_local), **state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._num_samples

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        if self._labels is None:
            self._labels = self._read_labels()
        return self._labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    @abc.abstractmethod
    def _read_labels(self) -> np.ndarray:
        """Return all labels, (N,) int64."""


@dataclass(frozen=True)
class Splits:
    """A training source, and a validation source or None."""

    train: SampleSource
    validation: SampleSource | None

    @property
    def by_name(self) -> dict[str, SampleSource]:
        """The sources as "train" and, if there is one, "validation"."""
        return {"train": self.train, **({"validation": self.validation} if self.validation is not None else {})}


class _View(SampleSource):
    """Some samples of another source: those with its ids `rows`."""

    def __init__(self, source: SampleSource, rows: np.ndarray | slice) -> None:
        self._source, self._rows = source, rows

    @property
    def schema(self) -> Schema:
        return self._source.schema

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[self._rows]

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    @property
    def row_cost(self) -> RowCost:
        return self._source.row_cost

    def prepare(self) -> None:
        self._source.prepare()


class Limited(_View):
    """The first samples of a source.

    A limit that removes nothing keeps the source's fingerprint, so that scores of the whole source still fit.

    Args:
        source: any source.
        num_samples: at least 1; if the source has fewer, all are kept.

    Raises:
        ConfigError: num_samples is below 1.
    """

    def __init__(self, source: SampleSource, num_samples: int) -> None:
        if num_samples < 1:
            raise ConfigError(f"data.limit is {num_samples}: set it to at least 1, or leave it out for all samples")
        self._num_samples = min(num_samples, len(source))
        super().__init__(source, slice(self._num_samples))

    def __len__(self) -> int:
        return self._num_samples

    @property
    def fingerprint(self) -> str:
        whole = self._num_samples == len(self._source)
        return self._source.fingerprint if whole else digest("limited", self._source.fingerprint, self._num_samples)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        return self._source.read(ids)

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        return None if groups is None else np.append(groups[groups < self._num_samples], self._num_samples)


class Subset(_View):
    """Chosen samples of a source, in the given order: id i is sample `rows[i]`.

    Args:
        source: any source.
        rows: (N',) int64 ids of the source.

    Raises:
        DataError: a row is not in the source.
    """

    _rows: np.ndarray

    def __init__(self, source: SampleSource, rows: np.ndarray) -> None:
        check_ids(rows, len(source))
        super().__init__(source, np.ascontiguousarray(rows, dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        # Every read task carries a pickle. Ascending rows, such as those of a holdout, take one bit per source row.
        if not self._is_ascending:
            return {"source": self._source, "rows": self._rows}
        chosen = np.zeros(len(self._source), dtype=bool)
        chosen[self._rows] = True
        return {"source": self._source, "bits": np.packbits(chosen)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state["rows"] if "rows" in state else np.flatnonzero(np.unpackbits(state["bits"])).astype(np.int64)
        super().__init__(state["source"], rows)

    @property
    def _is_ascending(self) -> bool:
        return bool((np.diff(self._rows) > 0).all())

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        return digest("subset", self._source.fingerprint, self._rows)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        return self._source.read(self._rows[ids])

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        if groups is None or not self._is_ascending:
            return None
        return np.unique(np.searchsorted(self._rows, groups)).astype(np.int64)


class Concatenated(SampleSource):
    """The samples of one source and then those of another, such as training and validation data.

    Args:
        first, second: sources with the same columns.

    Raises:
        DataError: the columns differ.
    """

    def __init__(self, first: SampleSource, second: SampleSource) -> None:
        if dict(first.schema.columns) != dict(second.schema.columns):
            shapes = [{name: column.shape for name, column in each.schema.columns.items()} for each in (first, second)]
            raise DataError(
                f"rows of {shapes[0]} and of {shapes[1]} cannot be read together: give both the same columns"
            )
        self._parts = (first, second)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def schema(self) -> Schema:
        return self._parts[0].schema

    @property
    def fingerprint(self) -> str:
        return digest("concatenated", *(part.fingerprint for part in self._parts))

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([part.labels for part in self._parts])

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        first, second = self._parts
        in_second = ids >= len(first)
        if not in_second.any():
            return first.read(ids)
        if in_second.all():
            return second.read(ids - len(first))
        parts = [first.read(ids[~in_second]), second.read(ids[in_second] - len(first))]
        back = np.argsort(np.argsort(in_second, kind="stable"))
        columns = {name: np.concatenate([part[name] for part, _ in parts])[back] for name in self.schema.columns}
        return columns, sum(num_bytes for _, num_bytes in parts)

    @property
    def groups(self) -> np.ndarray | None:
        groups = [part.groups for part in self._parts]
        if all(each is None for each in groups):
            return None
        # Rows that can be read one by one are one group where those of the other part are not.
        first, second = (
            np.array([0, len(part)]) if each is None else each for part, each in zip(self._parts, groups, strict=True)
        )
        return np.concatenate([first, second[1:] + len(self._parts[0])])

    @property
    def row_cost(self) -> RowCost:
        return "expensive" if any(part.row_cost == "expensive" for part in self._parts) else "cheap"

    def prepare(self) -> None:
        for part in self._parts:
            part.prepare()


class Relabeled(_View):
    """All samples of a source, with other labels.

    Labels that are those of the source keep its fingerprint, so that scores of the source still fit.

    Args:
        source: any source whose samples have a class.
        labels: (N,) integers in 0..num_classes-1.

    Raises:
        DataError: there is not one label for each sample, or one is no class of the source.
    """

    def __init__(self, source: SampleSource, labels: np.ndarray) -> None:
        num_classes = source.schema.num_classes or 0
        if labels.shape != (len(source),) or labels.dtype.kind not in "iu":
            raise DataError(f"new labels are {labels.dtype} of shape {labels.shape}: give {len(source)} integers")
        outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if outside.size:
            raise DataError(f"sample {outside[0]} gets label {labels[outside[0]]}, outside 0..{num_classes - 1}")
        super().__init__(source, slice(None))
        # Every read task carries a pickle: only what changes goes along.
        self._changed = np.flatnonzero(labels != source.labels)
        self._new = labels[self._changed].astype(np.int64)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def num_changed(self) -> int:
        """The number of samples whose label differs from the source's."""
        return len(self._changed)

    @property
    def labels(self) -> np.ndarray:
        labels = self._source.labels.copy()
        labels[self._changed] = self._new
        return labels

    @property
    def fingerprint(self) -> str:
        whole = self._source.fingerprint
        return digest("relabeled", whole, self._changed, self._new) if self.num_changed else whole

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        columns, num_bytes = self._source.read(ids)
        places = np.searchsorted(self._changed, ids)
        rows = np.flatnonzero(np.append(self._changed, -1)[places] == ids)
        labels = columns["label"].copy()  # the source's own array, perhaps
        labels[rows] = self._new[places[rows]]
        return {**columns, "label": labels}, num_bytes

    @property
    def groups(self) -> np.ndarray | None:
        return self._source.groups


def holdout(source: SampleSource, fraction: float, seed: int = 0) -> Splits:
    """Split off a stratified validation part.

    The validation part has `round(fraction · N)` samples, at least 1, distributed over the classes in proportion to
    their sizes, by largest remainder. Every class keeps a training sample. Both parts keep the source's order.

    Args:
        source: any source with N samples.
        fraction: validation share, below 1; 0 for no validation part.
        seed: of `numpy.random.default_rng`.

    Returns:
        Both parts; validation is also None if no class has two samples.

    Raises:
        ConfigError: the fraction is outside its range.
        DataError: the samples have no class.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction}: it must be at least 0 and below 1")
    if fraction == 0:
        return Splits(source, None)
    labels = source.labels
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _holdout_quotas(counts, fraction)
    if quotas.sum() == 0:
        return Splits(source, None)
    rng = np.random.default_rng(seed)
    validates = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        validates[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return Splits(Subset(source, np.flatnonzero(~validates)), Subset(source, np.flatnonzero(validates)))


def _holdout_quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    total = max(1, round(fraction * int(counts.sum())))
    shares = fraction * counts
    quotas = np.minimum(np.floor(shares).astype(np.int64), counts - 1)
    for position in np.argsort(quotas - shares, kind="stable"):
        if quotas.sum() < total and quotas[position] < counts[position] - 1:
            quotas[position] += 1
    return np.asarray(quotas)


def shuffle_name(source: SampleSource) -> str:
    """Return a digest of the source's windows, on which the shuffled order depends too; "" if rows have no groups."""
    groups = source.groups
    return "" if groups is None else digest("windows", groups, block_rows(source.schema.row_bytes))


def check_ids(ids: np.ndarray, num_samples: int) -> None:
    """Refuse ids that are not in 0..num_samples-1.

    Raises:
        DataError: names the first five.
    """
    unknown = ids[(ids < 0) | (ids >= num_samples)]
    if len(unknown):
        first = ", ".join(str(int(sample)) for sample in unknown[:5])
        raise DataError(
            f"{len(unknown)} sample ids are not in the source, first {first}: valid are 0..{num_samples - 1}"
        )


def id_faults(ids: np.ndarray, num_samples: int) -> str:
    """Return the ids that are repeated, missing or outside 0..N-1, the first five of each kind; "" for none.

    >>> id_faults(np.array([2, 0, 1]), 3), id_faults(np.array([0, 0, 3]), 3)
    ('', 'repeated [0], missing [1, 2], outside [3]')
    """
    is_outside = (ids < 0) | (ids >= num_samples)
    counts = np.bincount(ids[~is_outside].astype(np.int64), minlength=num_samples)
    faults = {
        "repeated": np.flatnonzero(counts > 1),
        "missing": np.flatnonzero(counts == 0),
        "outside": ids[is_outside],
    }
    return ", ".join(f"{fault} {wrong[:5].tolist()}" for fault, wrong in faults.items() if len(wrong))


def spaced_ids(num_samples: int, count: int) -> np.ndarray:
    """Return at most `count` evenly spaced ids, int64.

    >>> spaced_ids(10, 4).tolist(), spaced_ids(2, 4).tolist()
    ([0, 2, 5, 7], [0, 1])
    """
    count = min(count, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // count


MAX_LABEL = 2**31 - 1
# A larger label than this allows is probably an id of something else.
SPARE_CLASSES, CLASSES_PER_SAMPLE = 1_000, 10


def count_classes(
    labels: np.ndarray, labels_name: str, num_classes: int | None, class_names: Sequence[str] = ()
) -> int:
    """Return the number of classes: as configured, else the number of class names, else the largest label + 1.

    Args:
        labels: (N,) integers of any width, N at least 1.
        labels_name: their origin, for messages.
        num_classes: data.num_classes.
        class_names: names that are stored with the labels, or none.

    Raises:
        DataError: the labels are too large, or too sparse to be numbered classes.
    """
    largest = int(labels.max())
    if largest > MAX_LABEL:
        raise DataError(f"{labels_name} holds {largest}: labels must be below 2**31, number the classes from 0")
    known = num_classes if num_classes is not None else len(class_names) or None
    if known is None and largest + 1 > CLASSES_PER_SAMPLE * len(labels) + SPARE_CLASSES:
        raise DataError(
            f"{labels_name} look like ids, not labels: the largest of {len(labels)} is {largest}; number the classes "
            "from 0, name another column or set data.num_classes"
        )
    return largest + 1 if known is None else known
