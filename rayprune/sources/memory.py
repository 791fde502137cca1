"""Columns in memory: a mapping of equally long NumPy arrays, for training loops of one's own and for notebooks.

A source of rows in equally long arrays, memory-mapped or in memory, that every process opens for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rayprune.errors import DataError
from rayprune.sources.base import Column, SampleSource, Schema, check_ids
from rayprune.sources.fingerprint import array_digest, digest


class RowSource(SampleSource):
    """Rows of arrays that are opened at the first use in each process.

    Args:
        open_arrays: returns the schema's columns by name, N rows each, readable as the schema's dtypes; picklable
            (a module's function, or a `functools.partial` of one with paths and settings).
        schema: the columns.
        fingerprint: of the samples.
        labels: (N,) int64; kept in this process only, the others read the `label` column.
    """

    def __init__(
        self,
        open_arrays: Callable[[], Mapping[str, np.ndarray]],
        schema: Schema,
        fingerprint: str,
        labels: np.ndarray,
    ) -> None:
        self._open_arrays = open_arrays
        self._schema = schema
        self._fingerprint = fingerprint
        self._num_samples = len(labels)
        self._forget()
        self._labels: np.ndarray | None = labels

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._arrays: Mapping[str, np.ndarray] | None = None
        self._labels = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"_lock", "_arrays", "_labels"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

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
            self._labels = np.asarray(self.arrays()["label"], dtype=np.int64).reshape(-1)
        return self._labels

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Return the opened arrays; the first call in a process opens them and may build a cache."""
        with self._lock:
            if self._arrays is None:
                self._arrays = self._open_arrays()
            return self._arrays

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, self._num_samples)
        arrays = self.arrays()
        return {
            name: np.ascontiguousarray(arrays[name][ids], dtype=column.dtype)
            for name, column in self._schema.columns.items()
        }

    def prepare(self) -> None:
        self.arrays()


class MemorySource(SampleSource):
    """Rows of arrays that are there already; pickles with them.

    Args:
        columns: name → (N, …) array of numbers; `id` and `weight` are names of the engine. An
            integer column `label` of shape (N,) gives the classes that a class floor counts.

    Raises:
        ValueError: no columns, columns of several lengths, of Python objects, or with a name that is taken.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        if not columns:
            raise DataError("no columns: give arrays by name, such as {'image': images, 'label': labels}")
        self._columns = {name: _array(name, values) for name, values in columns.items()}
        lengths = {name: len(values) if values.ndim else 0 for name, values in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"columns must be arrays of one length, got {lengths}")
        for name, values in self._columns.items():
            if name in {"id", "weight"}:
                raise DataError(f"column {name!r} is the engine's own name: call it something else")
            if values.dtype.kind not in "biuf":
                raise DataError(f"column {name!r} is {values.dtype}: give numbers (encode text and categories first)")
        self._length = next(iter(lengths.values()))
        if self._length == 0:
            raise DataError(f"columns {', '.join(self._columns)} have no rows: give at least one sample")
        columns_of = {name: Column(values.shape[1:], values.dtype.name) for name, values in self._columns.items()}
        self._schema = Schema(columns_of)
        parts = [part for name, values in self._columns.items() for part in (name, array_digest(values))]
        self._fingerprint = digest("memory", *parts)

    def __len__(self) -> int:
        return self._length

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        labels = self._columns.get("label")
        if labels is None or labels.dtype.kind not in "iu" or labels.ndim != 1:
            raise DataError("these samples have no integer column 'label' of shape (N,): add it, or set class_floor=0")
        return labels.astype(np.int64)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        check_ids(ids, self._length)
        return {name: np.ascontiguousarray(values[ids]) for name, values in self._columns.items()}


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # ragged lists; tensors on a GPU, with gradients, in bfloat16
        line = " ".join(str(error).split())[:120]
        raise DataError(f"column {name!r} makes no array ({line}): give a NumPy array of numbers") from None
