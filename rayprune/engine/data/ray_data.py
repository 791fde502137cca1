"""The Dataset of a run: its read tasks are the blocks of the ScoreActor's current plan.

One Dataset and one streaming_split serve the whole run, because the split coordinator plans anew for every iteration.
`Datasource` and `ReadTask` are no stable API of Ray: they are used here and nowhere else.

Any `ray.data.Dataset` with an id column: each epoch's selection is picked out of its stream, weights joined on.

What holds: the ids and weights of every epoch, and resume at epoch ends. What does not: the order of rows is the data
set's own, no row is skipped unread, and the equal split over the workers may leave up to W − 1 rows of an epoch out.

Shapes: N samples, W workers.

Sources for other processes: rows in memory go into Ray's object store once, the ScoreActor gets facts only.
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

from rayprune.core.plan import BLOCK_ROWS
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import BYTES_READ
from rayprune.engine.scoring.client import LoopClient, ScoreClient
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.errors import ConfigError, PlanMismatch
from rayprune.sources import MemorySource, SampleSource, Schema
from rayprune.sources.fingerprint import digest
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


class ObjectStoreSource(_Described):
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
    return ObjectStoreSource(source) if isinstance(source, MemorySource | ItemSource) else source


class SourceMetadata(_Described):
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
                raise ConfigError(f"the Dataset has no column {name!r} (it has {', '.join(names) or 'none'}): add it")
        for name in ("id", "weight"):
            if name in names and name != id_column:
                raise ConfigError(f"column {name!r} of the Dataset is the engine's own name: rename it")
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
                raise ConfigError(
                    f"column {label_column!r} is {labels.dtype}: class_floor needs integers, none missing"
                )
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
            raise ConfigError("class_floor needs an integer column 'label' in the Dataset")
        return self._labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("rows of a ray.data.Dataset come by its stream")


def _checked(ids: NDArray[Any], name: str) -> NDArray[np.int64]:
    if ids.dtype.kind not in "iu":
        raise ConfigError(f"column {name!r} of the Dataset is {ids.dtype}: ids are integers 0..N−1")
    if not ids.size:
        raise ConfigError("the Dataset has no rows")
    outside = ids[(ids < 0) | (ids >= ids.size)]
    if outside.size:
        raise ConfigError(
            f"column {name!r} holds {outside[0]}: ids of {ids.size} rows must be 0..{ids.size - 1}, no gaps"
        )
    counts = np.bincount(ids, minlength=ids.size)
    if (counts > 1).any():
        raise ConfigError(f"column {name!r} holds {int(np.argmax(counts > 1))} twice: every row needs an id of its own")
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


# From 0.1 to 0.2 s of decoding small images.
_LEAST_ROWS, _DECODED_ROWS = 2_048, 8_192
_MOST_TASKS = 4_096  # an epoch, as Ray plans them one by one
# A source that holds its data is not sent with each read task.
_LARGE_SOURCE_BYTES = 256 * 1024


class PlanDatasource(Datasource):
    """Serve the blocks of the ScoreActor's current plan as read tasks.

    Planning happens on the driver at construction and more than once an epoch, so it only looks and changes nothing;
    before the first turn there are no blocks. Row counts stay out of the metadata: Ray would keep the first plan's.

    Attributes:
        asks: whether planning asks for the plan; False for an answer without blocks.
    """

    def __init__(self, scores: ScoreClient, sources: Mapping[str, SampleSource]) -> None:
        super().__init__()
        self._scores, self.asks = scores, True
        self._sources = {name: _sent(source) for name, source in sources.items()}

    def get_name(self) -> str:
        """Return the name that Ray shows."""
        return "Plan"

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: it differs from epoch to epoch."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """Return one task for each block of the current plan, in the plan's order."""
        if not self.asks:
            return []
        phase, blocks = self._scores.blocks()
        source = self._sources["validation" if phase == "validate" else "train"]
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Read(source, ids, weights), metadata) for ids, weights in blocks]


def _sent(source: SampleSource) -> SampleSource | ray.ObjectRef:
    """Return what read tasks carry of a source: itself, or where it is large a reference, sent to each node once."""
    return ray.put(source) if len(ray.cloudpickle.dumps(source)) > _LARGE_SOURCE_BYTES else source


@functools.lru_cache(maxsize=4)
def _fetched(reference: ray.ObjectRef) -> SampleSource:
    """Return a source, one for all tasks of this process."""
    source: SampleSource = ray.get(reference)
    return source


@dataclass(frozen=True)
class _Read:
    """Read one block; holds a copy of its ids, so that no task depends on an object that the actor owns."""

    source: SampleSource | ray.ObjectRef
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]

    # By this name Ray warns of tasks above 1 MiB, and fails where a task that is no function has none.
    __name__ = "Plan"

    def __call__(self) -> list[Any]:
        source = _fetched(self.source) if isinstance(self.source, ray.ObjectRef) else self.source
        columns, num_bytes = source.read(self.ids)
        # The count travels with the rows: all of it with the first one.
        read = np.zeros(self.ids.size, dtype=np.int64)
        read[:1] = num_bytes
        return [BlockAccessor.batch_to_block({**columns, "id": self.ids, "weight": self.weights, BYTES_READ: read})]


def task_rows(source: SampleSource, num_cpus: float) -> int:
    """Return how many rows a read task takes at most.

    Many where rows are cheap, as a task costs some 25 ms whatever it reads, and where rows lie in groups, which are
    read whole. Rows that are decoded are spread over the CPUs, twice over.

    Args:
        source: the training source.
        num_cpus: of the cluster.
    """
    if source.row_cost == "cheap" or source.groups is not None:
        return BLOCK_ROWS
    spread = min(_DECODED_ROWS, int(len(source) / (2 * max(num_cpus, 1))))
    return max(_LEAST_ROWS, spread, min(BLOCK_ROWS, len(source) // _MOST_TASKS))


def plan_dataset(scores: ScoreClient, sources: Mapping[str, SampleSource], *, elastic: bool = False) -> Any:
    """Return the one Dataset of a run; set the order-keeping option that TorchTrainer's DataConfig picks up.

    Args:
        scores: whose plan is read.
        sources: "train" and, where there is one, "validation".
        elastic: the number of workers may change. Ray Train then fills every CPU with workers, so that reading must do
            without a reserved one: it would wait for ever.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    source = PlanDatasource(scores, sources)
    source.asks = False  # there is no plan yet, and the actor may still be starting: it is not waited for
    dataset = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0.0 if elastic else None)
    source.asks = True
    return dataset
