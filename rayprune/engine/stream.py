"""The transports of a plan, one interface: this rank's batches, in the plan's order.

`stream: ray`: a Datasource whose read tasks are the blocks of the ScoreActor's current plan; the decoded rows travel
through Ray Data and workers never open the source. One Dataset and one streaming_split serve the whole run, because the
split coordinator plans anew for every iteration. `stream: local`: the worker reads its rows from the SampleSource, a
thread ahead. `stream: device`, whose rows lie on the device, has a module of its own. `Datasource` and `ReadTask` are
no stable API of Ray: they are used here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockAccessor, BlockMetadata

from rayprune.core.plan import block_rows
from rayprune.engine.client import RemoteScores, ScoreClient
from rayprune.engine.protocol import PlanHeader, PlanMismatch, Turn
from rayprune.sources import SampleSource, Schema
from rayprune.sources.fingerprint import digest

if TYPE_CHECKING:
    from torch import Tensor

    from rayprune.engine.placing import PlacedRows

Columns = Mapping[str, "NDArray[Any] | Tensor"]
_Rows = tuple[Columns, int]
Share = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]

# Rows that a worker reads or asks the plan for at once: enough to make the cost a call vanish, little to hold.
SPAN_ROWS = 65_536
LOCAL_READ_ROWS = 2_048
_LOCAL_READ_BYTES = 16 * 1024 * 1024
_AHEAD = 2
_CURE = (
    "a data set that is mapped over must keep rows and order: map_batches(…, batch_size=None), no filter, no shuffle"
)
# A user's map may see it and must not mistake it for a column of the data.
_BYTES_READ = "__bytes_read"
# A source that holds its data is not sent with each read task.
_LARGE_SOURCE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        columns: name → (B, …) as the source delivers them, arrays or tensors.
        ids: (B,) int64.
        weights: (B,) float32, 0 for padding.
        real: (B,) False for padding.
        num_bytes: what was read from storage since the batch before; the first batch of what is read at once has all.
        placed: ids, weights and real on the device, where the transport has put them and the columns there.
    """

    columns: Columns
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    real: NDArray[np.bool_]
    num_bytes: int = 0
    placed: PlacedRows | None = None


class Transport(Protocol):
    """Deliver the rows of this rank's shares, batch after batch.

    Attributes:
        resumes_inside: whether a pass may begin at any step of a plan.
    """

    resumes_inside: bool

    def batches(self, turn: Turn, shares: Iterator[Share], batch_rows: int) -> Iterator[Batch]:
        """Yield one Batch for each `batch_rows` rows of the shares, in order.

        Raises:
            PlanMismatch: other rows came than the plan says.
        """


def row_bytes(schema: Schema) -> int:
    """Return the bytes of one decoded row."""
    return sum(int(np.prod(column.shape)) * np.dtype(column.dtype).itemsize for column in schema.columns.values())


def shuffle_name(source: SampleSource) -> str:
    """Return what the order of a plan depends on besides ids and seed: "" or a digest of the source's windows."""
    groups = source.groups
    return "" if groups is None else digest("windows", groups, block_rows(row_bytes(source.schema)))


def plan_batches(
    client: ScoreClient, generation: int, turn: Turn, header: PlanHeader, rank: int, batch_size: int, via: Transport
) -> Iterator[Batch]:
    """Yield this rank's batches of a turn.

    Args:
        client, generation: where the plan is and who asks.
        turn, header: the turn that was announced and its plan's header.
        rank: this worker's rank.
        batch_size: the global batch.
        via: the transport.
    """
    rows = batch_size // turn.world_size
    steps = max(1, SPAN_ROWS // rows)

    def shares() -> Iterator[Share]:
        for start in range(turn.start_step, header.num_steps, steps):
            stop = min(start + steps, header.num_steps)
            yield client.call("share", generation, turn, rank, start, stop)

    if turn.start_step < header.num_steps:
        yield from via.batches(turn, shares(), rows)


class LocalStream:
    """Read rows in this process, a thread ahead of training.

    Args:
        sources: "train" and, where there is one, "validation".
        made: what the reading thread makes of each column of many rows; None leaves it an array.
    """

    resumes_inside = True

    def __init__(
        self, sources: Mapping[str, SampleSource], made: Callable[[NDArray[Any]], NDArray[Any] | Tensor] | None = None
    ) -> None:
        self._sources, self._made = sources, made

    def batches(self, turn: Turn, shares: Iterator[Share], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        source = self._sources["validation" if turn.phase == "validate" else "train"]
        budget = max(1, _LOCAL_READ_BYTES // max(1, row_bytes(source.schema)))
        read_rows = max(1, min(LOCAL_READ_ROWS, budget) // batch_rows) * batch_rows
        with ThreadPoolExecutor(1, thread_name_prefix="rayprune-read") as reader:
            waiting: list[tuple[Future[_Rows], Share]] = []
            for ids, weights, real in shares:
                for start in range(0, ids.size, read_rows):
                    part = slice(start, start + read_rows)
                    waiting.append(
                        (reader.submit(self._read, source, ids[part]), (ids[part], weights[part], real[part]))
                    )
                    if len(waiting) > _AHEAD:
                        yield from _cut(*waiting.pop(0), batch_rows)
            for read in waiting:
                yield from _cut(*read, batch_rows)

    def _read(self, source: SampleSource, ids: NDArray[np.int64]) -> _Rows:
        columns, num_bytes = source.read(ids)
        return columns if self._made is None else {n: self._made(c) for n, c in columns.items()}, num_bytes


def _cut(read: Future[_Rows], share: Share, batch_rows: int) -> Iterator[Batch]:
    (columns, num_bytes), (ids, weights, real) = read.result(), share
    for start in range(0, ids.size, batch_rows):
        part = slice(start, start + batch_rows)
        cut = {name: column[part] for name, column in columns.items()}
        yield Batch(cut, ids[part], weights[part], real[part], 0 if start else num_bytes)


class RayStream:
    """Take rows from this rank's split of the Ray Data stream and check them against the plan."""

    resumes_inside = True

    def __init__(self, shard: Any) -> None:
        self._shard = shard

    def batches(self, turn: Turn, shares: Iterator[Share], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        # Whole blocks, cut here: Ray's own cutting costs half a millisecond a batch.
        blocks = iter(self._shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=_AHEAD))
        cut = _cut_blocks(blocks, batch_rows)
        for ids, weights, real in shares:
            for start in range(0, ids.size, batch_rows):
                part = slice(start, start + batch_rows)
                columns, num_bytes = next(cut, (None, 0))
                if columns is None or not np.array_equal(columns["id"], ids[part]):
                    got = "the stream ended" if columns is None else f"ids {columns['id'][:3].tolist()}… came"
                    raise PlanMismatch(
                        f"epoch {turn.epoch}, {turn.phase}: {got}, not {ids[part][:3].tolist()}…; {_CURE}"
                    )
                yield Batch(columns, ids[part], weights[part], real[part], num_bytes)
        if next(cut, None) is not None:
            raise PlanMismatch(f"epoch {turn.epoch}, {turn.phase}: the stream holds more rows than the plan")


def _cut_blocks(blocks: Iterator[Columns], batch_rows: int) -> Iterator[tuple[Columns, int]]:
    """Cut blocks, which are whole steps, into batches, each with the bytes that were read for it."""
    for block in blocks:
        if "id" not in block:
            raise PlanMismatch("the batches have lost their column 'id': keep id and weight in map_batches")
        read = block.get(_BYTES_READ, np.zeros(0, np.int64))
        columns = {name: column for name, column in block.items() if name != _BYTES_READ}
        for start in range(0, len(block["id"]), batch_rows):
            part = slice(start, start + batch_rows)
            yield {name: column[part] for name, column in columns.items()}, int(read[part].sum())


class PlanDatasource(Datasource):
    """Serve the blocks of the ScoreActor's current plan as read tasks.

    Planning happens on the driver at construction and more than once an epoch, so it only looks and changes nothing;
    before the first turn there are no blocks. Row counts stay out of the metadata: Ray would keep the first plan's.

    Attributes:
        asks: whether planning asks for the plan; False for an answer without blocks.
    """

    def __init__(self, scores: RemoteScores, sources: Mapping[str, SampleSource]) -> None:
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
        phase, blocks = self._scores.call("blocks")
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
        return [BlockAccessor.batch_to_block({**columns, "id": self.ids, "weight": self.weights, _BYTES_READ: read})]


def plan_dataset(scores: RemoteScores, sources: Mapping[str, SampleSource], *, elastic: bool = False) -> Any:
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
