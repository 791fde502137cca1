"""Any `ray.data.Dataset` with an id column: each epoch's selection is picked out of its stream, weights joined on.

What holds: the ids and weights of every epoch, and resume at epoch ends. What does not: the order of rows is the data
set's own, no row is skipped unread, and the equal split over the workers may leave up to W − 1 rows of an epoch out.

Shapes: N samples, W workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayprune.engine.client import LoopClient
from rayprune.engine.protocol import PlanMismatch, PlanPass, RankRows
from rayprune.engine.stream import Batch
from rayprune.sources import SampleSource, Schema
from rayprune.sources.fingerprint import digest

GUARANTEES = "ids and weights are exact, the order is the data set's own, resume is at epoch ends"


class IdColumn(SampleSource):
    """What is known of a Dataset: its ids, one pass over that column; rows come by the stream alone.

    Args:
        dataset: a ray.data.Dataset.
        id_column: integers, each of 0..N−1 once, in any order.
        label_column: read too where classes are counted, else None.

    Raises:
        ValueError: the column is missing, holds no integers, repeats or leaves gaps; the first are named.
    """

    def __init__(self, dataset: Any, id_column: str, label_column: str | None) -> None:
        schema = dataset.schema()
        names = list(schema.names) if schema is not None else []
        for name in (id_column, *([label_column] if label_column else [])):
            if name not in names:
                raise ValueError(f"the Dataset has no column {name!r} (it has {', '.join(names) or 'none'}): add it")
        for name in ("id", "weight"):
            if name in names and name != id_column:
                raise ValueError(f"column {name!r} of the Dataset is the engine's own name: rename it")
        columns = [id_column] + ([label_column] if label_column else [])
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
        for batch in dataset.select_columns(columns).iter_batches(batch_size=None, batch_format="numpy"):
            for name in columns:
                parts[name].append(np.asarray(batch[name]))
        ids = _checked(np.concatenate(parts[id_column]) if parts[id_column] else np.empty(0, np.int64), id_column)
        self._length = len(ids)
        self._labels: NDArray[np.int64] | None = None
        if label_column:
            labels = np.concatenate(parts[label_column])
            if labels.dtype.kind not in "iu":
                raise ValueError(f"column {label_column!r} is {labels.dtype}: class_floor needs integers, none missing")
            self._labels = np.empty(len(ids), dtype=np.int64)
            self._labels[ids] = labels
        described = [str(part) for part in zip(names, schema.types, strict=True)]
        self._fingerprint = digest(
            "dataset", self._length, *described, *([] if self._labels is None else [self._labels])
        )

    def __len__(self) -> int:
        return self._length

    @property
    def schema(self) -> Schema:
        return Schema({})

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def labels(self) -> np.ndarray:
        if self._labels is None:
            raise ValueError("class_floor needs an integer column 'label' in the Dataset")
        return self._labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("rows of a ray.data.Dataset come by its stream")


def _checked(ids: NDArray[Any], name: str) -> NDArray[np.int64]:
    if ids.dtype.kind not in "iu":
        raise ValueError(f"column {name!r} of the Dataset is {ids.dtype}: ids are integers 0..N−1")
    if not ids.size:
        raise ValueError("the Dataset has no rows")
    outside = ids[(ids < 0) | (ids >= ids.size)]
    if outside.size:
        raise ValueError(
            f"column {name!r} holds {outside[0]}: ids of {ids.size} rows must be 0..{ids.size - 1}, no gaps"
        )
    counts = np.bincount(ids, minlength=ids.size)
    if (counts > 1).any():
        raise ValueError(f"column {name!r} holds {int(np.argmax(counts > 1))} twice: every row needs an id of its own")
    return ids.astype(np.int64)


@dataclass(frozen=True)
class Pick:
    """Keep a block's rows that the running pass asks for, with the columns `id` and `weight`."""

    scores: LoopClient
    id_column: str

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the rows that are wanted, in their order."""
        codes, weights = _wanted(self.scores)
        ids = np.asarray(table.column(self.id_column)).astype(np.int64)
        kept = codes[ids] > 0
        table = table.filter(pa.array(kept))
        ids = ids[kept]
        for name, column in (("id", ids), ("weight", weights[codes[ids] - 1])):
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, pa.array(column))
        return table


# The newest pass's wishes in this process: tasks of one pass share them.
_NEWEST: dict[str, tuple[tuple[Any, ...], NDArray[np.uint8], NDArray[np.float32]]] = {}


def _wanted(scores: LoopClient) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    known = _NEWEST.get(scores.name)
    told = scores.wanted(None if known is None else known[0])
    if told is not None:
        _NEWEST[scores.name] = known = told
    assert known is not None
    return known[1], known[2]


class FilteredStream:
    """Take this rank's rows as Ray Data deals them out; a Transport without a plan."""

    resumes_inside = False

    def __init__(self, shard: Any) -> None:
        self._shard = shard

    def batches(self, plan_pass: PlanPass, shares: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport; the last batch may be short, on all ranks alike."""
        for columns in self._shard.iter_batches(batch_size=batch_rows, batch_format="numpy", prefetch_batches=2):
            for name in ("id", "weight"):
                if name not in columns:
                    raise PlanMismatch(f"the batches have lost their column {name!r}: keep it in map_batches")
            ids = np.asarray(columns["id"], dtype=np.int64)
            real = np.ones(ids.size, dtype=bool)
            yield Batch(columns, ids, np.asarray(columns["weight"], dtype=np.float32), real)
