"""The contract of a data source, and a base class for implementations.

Shapes: N samples, B batch, H height, W width, C channels, F features, G groups.
"""

from __future__ import annotations

import abc
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from rayprune.core.plan import block_rows
from rayprune.core.validation import AtMost
from rayprune.errors import DataError
from rayprune.sources.fingerprint import digest

logger = logging.getLogger(__name__)

RowCost = Literal["cheap", "expensive"]
NumClasses = Annotated[int | None, AtMost(10_000_000)]  # of data.num_classes
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

    def file_of(self, sample: int) -> str | None:
        """Return the path of the file that holds this sample alone, for people; None if it has no file of its own."""
        return None

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


def check_labels(
    labels: np.ndarray, num_classes: int, sample_name: Callable[[int], str], class_names: Sequence[str] = ()
) -> None:
    """Refuse labels that are no class; warn of those that the data have no name for.

    Args:
        labels: (N,) int64.
        num_classes: labels are in 0..num_classes-1.
        sample_name: maps a sample to its name in messages: its file and row.
        class_names: names that are stored with the labels, or none; data.num_classes may say that there are more.

    Raises:
        DataError: names the first sample.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        label = labels[outside[0]]
        bounds = "labels must be at least 0" if num_classes < 1 else f"outside 0..{num_classes - 1}"
        raise DataError(
            f"{sample_name(int(outside[0]))} has label {label}, {bounds}: correct the label, or data.num_classes"
        )
    unnamed = np.flatnonzero(labels >= len(class_names)) if class_names else outside
    if len(unnamed):
        logger.warning(
            "%s has label %d and the data name %d classes: with data.num_classes = %d the names are not used",
            sample_name(int(unnamed[0])),
            labels[unnamed[0]],
            len(class_names),
            num_classes,
        )
