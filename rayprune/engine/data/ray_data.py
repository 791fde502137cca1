"""Rows of a pass through Ray Data: planned, or filtered out of any `ray.data.Dataset`.

*Planned*: `plan_dataset` makes the one Dataset of a run. Its read tasks are the blocks of the ScoreActor's current
plan, so pruned rows are never read. One Dataset and one streaming_split serve the whole run, because the split
coordinator plans every iteration anew. `Datasource` and `ReadTask` are not a stable API of Ray; only this module uses
them.

*Filtered*: any `ray.data.Dataset` with an id column. The epoch's selection is filtered out of its stream, with weights
joined on. The ids and weights of every epoch are exact, and a run resumes at the end of an epoch. The order of rows is
the Dataset's own, and no row is skipped unread. The equal split over W workers needs a multiple of W rows, so up to
W − 1 others are left out in each epoch.

Shapes: N samples, W workers, B rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.extensions import ArrowPythonObjectArray, ArrowVariableShapedTensorArray

from rayprune.core.plan import BLOCK_ROWS
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import BYTES_READ
from rayprune.engine.scoring.client import LoopClient, ScoreClient
from rayprune.engine.scoring.loop_actor import WantedRows
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.errors import DataError, PlanMismatch, UsageError
from rayprune.sources import Column, MemorySource, SampleSource, Schema
from rayprune.sources.base import DescribedSource, RowCost, id_faults
from rayprune.sources.datasets.columns import NO_LABELS, find_label
from rayprune.sources.datasets.items import ItemSource
from rayprune.sources.fingerprint import digest

# Decoding this many small images takes 0.1 to 0.2 s.
_MIN_TASK_ROWS, _DECODED_TASK_ROWS = 2_048, 8_192
_MAX_TASKS = 4_096  # per epoch: Ray plans tasks one by one
_LARGE_SOURCE_BYTES = 256 * 1024

_METADATA = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
_NOT_ANNOUNCED = (
    "no epoch of this pruned dataset has begun: in the training loop, replace ray.train.get_dataset_shard by "
    "rayprune.get_dataset_shard and iterate its epochs()"
)

FILTERED_GUARANTEES = "ids and weights are exact, the order is the dataset's own, resume is at epoch ends"


def plan_dataset(scores: ScoreClient, sources: Mapping[str, SampleSource], *, elastic: bool = False) -> Any:
    """Return the Dataset of a run, and set the option that keeps its order where TorchTrainer's DataConfig finds it.

    Args:
        scores: the client of the actor that plans.
        sources: "train" and, if there is one, "validation".
        elastic: whether the number of workers may change. Ray Train then fills every CPU with workers, and reading must
            not wait for a CPU of its own.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    datasource = PlanDatasource(scores, sources)
    datasource.has_plan = False  # there is no plan yet, and the actor may still be starting
    dataset = ray.data.read_datasource(datasource, override_num_blocks=1, num_cpus=0.0 if elastic else None)
    datasource.has_plan = True
    return dataset


def task_rows(source: SampleSource, num_cpus: float) -> int:
    """Return the largest number of rows in a read task.

    A task costs about 25 ms whatever it reads, so cheap rows make large tasks, as do rows in groups, which are read
    whole. Rows to be decoded are spread over the CPUs, two tasks each.

    Args:
        source: the training source.
        num_cpus: CPUs of the cluster.
    """
    if source.row_cost == "cheap" or source.groups is not None:
        return BLOCK_ROWS
    rows_per_task = min(_DECODED_TASK_ROWS, int(len(source) / (2 * max(num_cpus, 1))))
    return max(_MIN_TASK_ROWS, rows_per_task, min(BLOCK_ROWS, len(source) // _MAX_TASKS))


class PlanDatasource(Datasource):
    """Serves the blocks of the ScoreActor's current plan as read tasks.

    Ray plans on the driver at construction and more than once per epoch, so planning has no side effects. Before the
    first pass of a user's loop, the only task raises an error. The metadata hold no row counts, because Ray would keep
    those of the first plan.

    Attributes:
        has_plan: False to plan without asking the actor; there are no blocks then.
    """

    def __init__(self, scores: ScoreClient, sources: Mapping[str, SampleSource]) -> None:
        super().__init__()
        self._scores, self.has_plan = scores, True
        self._sources = {name: in_object_store(source) for name, source in sources.items()}

    def get_name(self) -> str:
        """Return the name that Ray shows."""
        return "Plan"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None, because the size changes with every epoch."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return a task per block of the current plan, in the plan's order."""
        if not self.has_plan:
            return []
        phase, blocks = self._scores.blocks()
        if phase is None:
            return [ReadTask(_refuse, _METADATA)]
        source = self._sources["validation" if phase == "validate" else "train"]
        return [ReadTask(_ReadBlock(source, ids, weights), _METADATA) for ids, weights in blocks]


def _refuse() -> list[Any]:
    raise UsageError(_NOT_ANNOUNCED)


@dataclass(frozen=True)
class _ReadBlock:
    """Reads one block. It holds a copy of the ids, so that no task depends on an object of the actor's."""

    source: SampleSource
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    # Ray warns about tasks above 1 MiB by this name, and fails if a callable object has none.
    __name__ = "Plan"

    def __call__(self) -> list[Any]:
        columns, num_bytes = self.source.read(self.ids)
        bytes_read = np.zeros(self.ids.size, dtype=np.int64)
        bytes_read[:1] = num_bytes  # the first row carries the count
        rows = {**columns, "id": self.ids, "weight": self.weights, BYTES_READ: bytes_read}
        in_objects = [name for name, column in self.source.schema.columns.items() if column.in_objects]
        block: Any = BlockAccessor.batch_to_arrow_block({name: rows[name] for name in rows if name not in in_objects})
        for name in in_objects:
            block = block.append_column(name, _arrow_column(columns[name], self.source.schema.columns[name]))
        return [block]


def _arrow_column(values: NDArray[Any], column: Column) -> pa.Array:
    """Return ragged rows and Python objects, (B,) each, so that Ray delivers them as they are."""
    if not column.is_ragged:
        kinds = {type(value) for value in values if value is not None}
        if kinds <= {str} or kinds <= {bytes}:
            return pa.array(values, pa.string() if kinds <= {str} else pa.binary())
        return ArrowPythonObjectArray.from_objects(values)
    if len(column.shape) > 1:
        return ArrowVariableShapedTensorArray.from_numpy(values)
    offsets = np.cumsum([0, *map(len, values)])
    numbers = np.concatenate([np.empty(0, column.dtype), *values])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(numbers))


class SourceMetadata(DescribedSource):
    """Everything the ScoreActor needs of a source; without rows, so that a restart of the actor sends little.

    Args:
        source: any source.
        labeled: whether the actor needs the labels.
    """

    process_local = ()

    def __init__(self, source: SampleSource, labeled: bool) -> None:
        labels = source.labels if labeled else None
        super().__init__(len(source), source.schema, source.fingerprint, labels)
        self._groups = source.groups

    def _read_labels(self) -> np.ndarray:
        raise RuntimeError("the ScoreActor was sent no labels")

    @property
    def groups(self) -> np.ndarray | None:
        return self._groups

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("the ScoreActor reads no rows")


class ObjectStoreSource(DescribedSource):
    """A source in Ray's object store; a process fetches it when it first reads.

    Args:
        source: a source that is large when pickled, such as rows in memory.

    Attributes:
        reference: of the source.
    """

    def __init__(self, source: SampleSource) -> None:
        super().__init__(len(source), source.schema, source.fingerprint)
        self.reference, self._row_cost, self._groups = ray.put(source), source.row_cost, source.groups

    def _read_labels(self) -> np.ndarray:
        return _fetch(self.reference).labels

    @property
    def row_cost(self) -> RowCost:
        return self._row_cost

    @property
    def groups(self) -> np.ndarray | None:
        return self._groups

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return _fetch(self.reference).take(ids)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        return _fetch(self.reference).read(ids)


@functools.lru_cache(maxsize=4)
def _fetch(reference: ray.ObjectRef) -> SampleSource:
    source: SampleSource = ray.get(reference)
    return source


def fetched(source: SampleSource) -> SampleSource:
    """Return a source that reads without Ray, whose connection a forked process would share with its parent."""
    return _fetch(source.reference) if isinstance(source, ObjectStoreSource) else source


def in_object_store(source: SampleSource) -> SampleSource:
    """Return a source that is small when pickled: itself, or through Ray's object store."""
    if isinstance(source, ObjectStoreSource):
        return source
    has_rows = isinstance(source, MemorySource | ItemSource)
    is_large = has_rows or len(ray.cloudpickle.dumps(source)) > _LARGE_SOURCE_BYTES
    return ObjectStoreSource(source) if is_large else source


class IdColumn(DescribedSource):
    """The ids (and labels) of a Dataset, from one pass over these columns; its rows come through its stream only.

    Args:
        dataset: a ray.data.Dataset.
        id_column: integers, each of 0..N−1 once, in any order.
        labeled: whether the labels are needed.
        label_column: integers; default: `label` or `labels`.

    Raises:
        DataError: a column is missing or not of integers, or ids repeat or leave gaps; names the first.
    """

    process_local = ()

    def __init__(self, dataset: Any, id_column: str, labeled: bool = False, label_column: str | None = None) -> None:
        schema = dataset.schema()
        names = list(schema.names) if schema is not None else []
        if id_column not in names:
            raise DataError(
                f"the Dataset has no column {id_column!r} (it has {', '.join(names) or 'none'}): name the column of "
                "its ids with id_column, or number its rows with rayprune.with_ids(ds)"
            )
        label = find_label(names, label_column)
        if labeled and label is None:
            raise DataError(NO_LABELS)
        columns = [id_column, *([label] if labeled and label is not None else [])]
        for name in ("id", "weight"):
            if name in names and name != id_column:
                raise DataError(f"column {name!r} of the Dataset has a name that rayprune adds itself: rename it")
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in columns}
        for batch in dataset.select_columns(columns).iter_batches(batch_size=None, batch_format="numpy"):
            for name in columns:
                parts[name].append(np.asarray(batch[name]))
        if not parts[id_column]:
            raise DataError("the Dataset has no rows: give one that has some")
        ids = _checked_ids(np.concatenate(parts[id_column]), id_column)
        labels: NDArray[np.int64] | None = None
        if labeled and label is not None:
            values = np.concatenate(parts[label])
            if values.dtype.kind not in "iu":
                raise DataError(f"column {label!r} is {values.dtype}: class_floor needs integers, none missing")
            labels = np.empty(len(ids), dtype=np.int64)
            labels[ids] = values
        fields = [str(field) for field in zip(names, schema.types, strict=True)]
        fingerprint = digest("dataset", len(ids), *fields, *([] if labels is None else [labels]))
        super().__init__(len(ids), Schema({}), fingerprint, labels)

    def _read_labels(self) -> np.ndarray:
        raise DataError(NO_LABELS)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("the rows of a ray.data.Dataset come through its stream")


def _checked_ids(ids: NDArray[Any], name: str) -> NDArray[np.int64]:
    if ids.dtype.kind not in "iu":
        raise DataError(f"column {name!r} of the Dataset is {ids.dtype}: ids must be integers 0..N−1")
    if faults := id_faults(ids, ids.size):
        raise DataError(f"column {name!r} of the Dataset must hold each id of 0..{ids.size - 1} once: {faults}")
    return ids.astype(np.int64)


@dataclass(frozen=True)
class KeepWantedRows:
    """Keeps the rows of a block that the current pass wants and adds the columns `id` and `weight`."""

    scores: LoopClient
    id_column: str

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the wanted rows (B, …), in their order."""
        key, codes_N, code_weights = _wanted_rows(self.scores)
        if not key and table.num_rows:
            raise UsageError(_NOT_ANNOUNCED)
        ids = np.asarray(table.column(self.id_column)).astype(np.int64)
        is_wanted = codes_N[ids] > 0
        table, ids = table.filter(pa.array(is_wanted)), ids[is_wanted]
        for name, column in (("id", ids), ("weight", code_weights[codes_N[ids] - 1])):
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, pa.array(column))
        return table


# The wanted rows of the newest pass, by actor: the tasks of a pass in one process share them.
_NEWEST: dict[str, WantedRows] = {}


def _wanted_rows(scores: LoopClient) -> WantedRows:
    known = _NEWEST.get(scores.name)
    newer = scores.wanted_rows(None if known is None else known[0])
    if newer is not None:
        _NEWEST[scores.name] = known = newer
    assert known is not None
    return known


class FilteredStream:
    """Takes this rank's rows as Ray Data splits them; a Transport without a plan."""

    resumes_inside = False

    def __init__(self, shard: Any) -> None:
        self._shard = shard

    def batches(self, plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport; the last batch may be short, on all ranks alike."""
        for columns in self._shard.iter_batches(batch_size=batch_rows, batch_format="numpy", prefetch_batches=2):
            for name in ("id", "weight"):
                if name not in columns:
                    raise PlanMismatch(f"the batches have lost their column {name!r}: keep it in map_batches")
            ids = np.asarray(columns["id"], dtype=np.int64)
            real = np.ones(ids.size, dtype=bool)
            yield Batch(columns, ids, np.asarray(columns["weight"], dtype=np.float32), real)
