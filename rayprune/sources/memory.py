"""Columns in memory: a mapping of equally long NumPy arrays, for training loops of one's own and for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayprune.sources.base import Column, SampleSource, Schema, check_ids
from rayprune.sources.fingerprint import array_digest, digest


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
            raise ValueError("no columns: give arrays by name, such as {'image': images, 'label': labels}")
        self._columns = {name: _array(name, values) for name, values in columns.items()}
        lengths = {name: len(values) if values.ndim else 0 for name, values in self._columns.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns must be arrays of one length, got {lengths}")
        for name, values in self._columns.items():
            if name in {"id", "weight"}:
                raise ValueError(f"column {name!r} is the engine's own name: call it something else")
            if values.dtype.kind not in "biuf":
                raise ValueError(f"column {name!r} is {values.dtype}: give numbers (encode text and categories first)")
        self._length = next(iter(lengths.values()))
        if self._length == 0:
            raise ValueError(f"columns {', '.join(self._columns)} have no rows: give at least one sample")
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
            raise ValueError("these samples have no integer column 'label' of shape (N,): add it, or set class_floor=0")
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
        raise ValueError(f"column {name!r} makes no array ({line}): give a NumPy array of numbers") from None
