"""A source of rows in equally long arrays, memory-mapped or in memory, that every process opens for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rayprune.sources.base import SampleSource, Schema, check_ids


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
