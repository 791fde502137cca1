"""Rows of equally long NumPy arrays: opened by each process for itself, or held in memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rayprune.errors import DataError
from rayprune.sources.base import DescribedSource, Schema, check_ids
from rayprune.sources.datasets.columns import (
    NO_LABELS,
    as_column,
    as_row,
    check_names,
    column_digest,
    column_of,
    find_label,
)
from rayprune.sources.fingerprint import digest


def rows_of(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return rows of an array; of a memory map only while its file is whole.

    The operating system kills a process that reads a map beyond the end of its file, and adds zeros to the last page.
    Reading each row by a system call instead would take 2 to 10 times as long, so a file that is cut within the
    milliseconds of a copy still ends the process.

    Raises:
        DataError: the file has been cut since it was mapped.
    """
    owner: Any = values
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not isinstance(owner.base, mmap.mmap):
        return values[ids]
    rows = values[ids] if owner.base.size() >= len(owner.base) else None
    if rows is None or owner.base.size() < len(owner.base):
        raise DataError(
            f"{owner.filename} has been cut off since it was opened: restore it, and run the same command again"
        )
    return rows


class RowSource(DescribedSource):
    """Rows of arrays that each process opens when it first needs them.

    Args:
        open_arrays: returns the schema's columns by name, N rows each, convertible to the schema's dtypes; picklable
            (a module's function, or a `functools.partial` of one with paths and settings).
        schema: the columns.
        fingerprint: of the samples.
        labels: (N,) int64; not pickled, other processes read the `label` column.
        file_of: as the method; not pickled.
    """

    process_local = ("_arrays", "_labels", "_file_of")

    def __init__(
        self,
        open_arrays: Callable[[], Mapping[str, np.ndarray]],
        schema: Schema,
        fingerprint: str,
        labels: np.ndarray,
        file_of: Callable[[int], str | None] | None = None,
    ) -> None:
        super().__init__(len(labels), schema, fingerprint, labels)
        self._open_arrays, self._file_of = open_arrays, file_of
        self._arrays: Mapping[str, np.ndarray] | None = None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Return the opened arrays; the first call in a process opens them and may build a cache."""
        with self._lock:
            if self._arrays is None:
                self._arrays = self._open_arrays()
            return self._arrays

    def _read_labels(self) -> np.ndarray:
        labels = self.arrays()["label"]
        return rows_of(labels, np.arange(len(labels))).reshape(-1).astype(np.int64)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        arrays = self.arrays()
        return {
            name: np.ascontiguousarray(rows_of(arrays[name], ids), dtype=column.dtype)
            for name, column in self.schema.columns.items()
        }

    def file_of(self, sample: int) -> str | None:
        return None if self._file_of is None else self._file_of(sample)

    def prepare(self) -> None:
        self.arrays()


class MemorySource(DescribedSource):
    """Rows of arrays in memory, for notebooks and users' own training loops; pickles with the arrays.

    Args:
        columns: name → (N, …) array of numbers, or N arrays of several lengths, texts or other Python objects; `id` and
            `weight` are reserved for the columns that rayprune adds to every batch.
        label_column: integers of shape (N,), the classes that a class floor counts; default: `label` or `labels`.

    Raises:
        DataError: no columns, columns of different lengths or with a reserved name, or no such label column.
    """

    def __init__(self, columns: Mapping[str, Any], label_column: str | None = None) -> None:
        if not columns:
            raise DataError("no columns: give arrays by name, such as {'image': images, 'label': labels}")
        check_names(columns)
        self._columns = {name: _as_array(name, values) for name, values in columns.items()}
        lengths = {name: len(values) if values.ndim else 0 for name, values in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"columns must be arrays of one length, got {lengths}: give each a row per sample")
        num_samples = next(iter(lengths.values()))
        if num_samples == 0:
            raise DataError(f"columns {', '.join(self._columns)} have no rows: give at least one sample")
        self._label = find_label(self._columns, label_column)
        schema = Schema({name: column_of(values) for name, values in self._columns.items()})
        parts = [part for name, values in self._columns.items() for part in (name, column_digest(values))]
        super().__init__(num_samples, schema, digest("memory", *parts))

    def _read_labels(self) -> np.ndarray:
        if self._label is None:
            raise DataError(NO_LABELS)
        labels = self._columns[self._label]
        if labels.dtype.kind not in "biu" or labels.ndim != 1:
            raise DataError(
                f"column {self._label!r} is {labels.dtype} {labels.shape}, and labels are integers of shape (N,): name "
                "another one with label_column, or set class_floor=0"
            )
        return labels.astype(np.int64)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        return {name: np.ascontiguousarray(values[ids]) for name, values in self._columns.items()}


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):  # lists of several lengths, and tensors that NumPy cannot hold
        array = None
    if array is not None and array.dtype.kind not in "OSU":
        return array
    try:
        return as_column([as_row(value) for value in values])
    except DataError as error:
        raise DataError(f"column {name!r} {error}") from None
