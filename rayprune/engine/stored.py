"""Sources for other processes: rows in memory go into Ray's object store once, the ScoreActor gets facts only."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from rayprune.sources import MemorySource, SampleSource, Schema
from rayprune.sources.torch_dataset import ItemSource


class _Described(SampleSource):
    """What is known of another source without its rows."""

    def __init__(self, source: SampleSource) -> None:
        self._length, self._schema, self._fingerprint = len(source), source.schema, source.fingerprint

    def __len__(self) -> int:
        return self._length

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def fingerprint(self) -> str:
        return self._fingerprint


class StoredSource(_Described):
    """A source in the object store; each process maps it when it first reads.

    Args:
        source: whose rows are in memory.
    """

    def __init__(self, source: SampleSource) -> None:
        super().__init__(source)
        self._reference = ray.put(source)
        self._source: SampleSource | None = source

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_source": None}

    def _opened(self) -> SampleSource:
        if self._source is None:
            self._source = ray.get(self._reference)
        return self._source

    @property
    def labels(self) -> np.ndarray:
        return self._opened().labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self._opened().take(ids)


def stored(source: SampleSource) -> SampleSource:
    """Return the source, through the object store where it would travel with all its rows."""
    return StoredSource(source) if isinstance(source, MemorySource | ItemSource) else source


class Facts(_Described):
    """What the ScoreActor must know of a source; without rows, so that a restart of the actor needs nothing else.

    Args:
        source: any source.
        labelled: whether classes are counted.
    """

    def __init__(self, source: SampleSource, labelled: bool) -> None:
        super().__init__(source)
        self._labels = source.labels if labelled else None
        self._groups = source.groups

    @property
    def labels(self) -> np.ndarray:
        assert self._labels is not None
        return self._labels

    @property
    def groups(self) -> np.ndarray | None:
        return self._groups

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("the ScoreActor reads no rows")
