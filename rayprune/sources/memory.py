"""Rows of equally long NumPy arrays: opened by each process for itself, or held in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rayprune.errors import DataError, one_line
from rayprune.sources.base import RESERVED_NAMES, Column, DescribedSource, Schema, check_ids
from rayprune.sources.fingerprint import array_digest, digest


class RowSource(DescribedSource):
    """Rows of arrays that each process opens when it first needs them.

    Args:
        open_arrays: returns the schema's columns by name, N rows each, convertible to the schema's dtypes; picklable
            (a module's function, or a `functools.partial` of one with paths and settings).
        schema: the columns.
        fingerprint: of the samples.
        labels: (N,) int64; not pickled, other processes read the `label` column.
    """

    process_local = ("_arrays", "_labels")

    def __init__(
        self,
        open_arrays: Callable[[], Mapping[str, np.ndarray]],
        schema: Schema,
        fingerprint: str,
        labels: np.ndarray,
    ) -> None:
        super().__init__(len(labels), schema, fingerprint, labels)
        self._open_arrays = open_arrays
        self._arrays: Mapping[str, np.ndarray] | None = None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Return the opened arrays; the first call in a process opens them and may build a cache."""
        with self._lock:
            if self._arrays is None:
                self._arrays = self._open_arrays()
            return self._arrays

    def _read_labels(self) -> np.ndarray:
        return np.asarray(self.arrays()["label"], dtype=np.int64).reshape(-1)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        arrays = self.arrays()
        return {
            name: np.ascontiguousarray(arrays[name][ids], dtype=column.dtype)
            for name, column in self.schema.columns.items()
        }

    def prepare(self) -> None:
        self.arrays()


class MemorySource(DescribedSource):
    """Rows of arrays in memory, for notebooks and users' own training loops; pickles with the arrays.

    Args:
        columns: name → (N, …) array of numbers; `id` and `weight` are reserved for the columns that rayprune adds to
            every batch. An integer column `label` of shape (N,) gives the classes that a class floor counts.

    Raises:
        DataError: no columns, columns of different lengths, of Python objects, or with a reserved name.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        if not columns:
            raise DataError("no columns: give arrays by name, such as {'image': images, 'label': labels}")
        self._columns = {name: _as_array(name, values) for name, values in columns.items()}
        lengths = {name: len(values) if values.ndim else 0 for name, values in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"columns must be arrays of one length, got {lengths}")
        for name, values in self._columns.items():
            if name in RESERVED_NAMES:
                raise DataError(f"column {name!r} has a name that rayprune adds itself: rename it")
            if values.dtype.kind not in "biuf":
                raise DataError(f"column {name!r} is {values.dtype}: give numbers (encode text and categories first)")
        num_samples = next(iter(lengths.values()))
        if num_samples == 0:
            raise DataError(f"columns {', '.join(self._columns)} have no rows: give at least one sample")
        schema = Schema({name: Column(values.shape[1:], values.dtype.name) for name, values in self._columns.items()})
        parts = [part for name, values in self._columns.items() for part in (name, array_digest(values))]
        super().__init__(num_samples, schema, digest("memory", *parts))

    def _read_labels(self) -> np.ndarray:
        labels = self._columns.get("label")
        if labels is None or labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError("these samples have no integer column 'label' of shape (N,): add it, or set class_floor=0")
        return labels.astype(np.int64)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, len(self))
        return {name: np.ascontiguousarray(values[ids]) for name, values in self._columns.items()}


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        # Ragged lists, and tensors on a GPU, with gradients or in bfloat16.
        raise DataError(f"column {name!r} is not an array ({one_line(error)}): give a NumPy array of numbers") from None
