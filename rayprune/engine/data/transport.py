"""Transports deliver this rank's batches of a pass, in the plan's order.

With `stream: ray`, decoded rows travel through Ray Data (`rayprune.engine.data.ray_data`) and workers never open the
source. With `stream: local`, the worker reads its rows from the source in a thread. `stream: device`, which keeps all
rows on the device, is in `rayprune.engine.data.device`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rayprune.engine.data.batch import Batch, Columns
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.errors import PlanMismatch
from rayprune.sources import SampleSource
from rayprune.sources.datasets.columns import object_array

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Convert = Callable[["NDArray[Any]"], "NDArray[Any] | Tensor"]

LOCAL_READ_ROWS = 2_048
_LOCAL_READ_BYTES = 16 * 1024 * 1024
_PREFETCHED = 2  # reads or blocks
# The column that carries the count of bytes read; a user's map may see it and must not take it for data.
BYTES_READ = "__bytes_read"
_HOST_COLUMNS = ("id", "weight", BYTES_READ)
_CURE = (
    "a dataset that is mapped must keep its rows and their order: map_batches(…, batch_size=None), no filter, no "
    "shuffle"
)


class Transport(Protocol):
    """Delivers the rows of a pass, batch by batch.

    Attributes:
        resumes_inside: whether a pass may start at any step of a plan.
    """

    resumes_inside: bool

    def batches(self, plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """Yield one Batch per `batch_rows` rows.

        Args:
            plan_pass: the announced pass.
            spans: this rank's rows of its plan, in order, some thousands at a time.
            batch_rows: B.

        Raises:
            PlanMismatch: other rows came than the plan holds.
        """


class LocalStream:
    """Reads rows in this process, in a thread ahead of training.

    Args:
        sources: "train" and, if there is one, "validation".
        convert: applied to each column in the reading thread, for many rows at once.
    """

    resumes_inside = True

    def __init__(self, sources: Mapping[str, SampleSource], convert: Convert | None = None) -> None:
        self._sources, self._convert = sources, convert

    def batches(self, plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        source = self._sources["validation" if plan_pass.phase == "validate" else "train"]
        most_rows = max(1, _LOCAL_READ_BYTES // max(1, source.schema.row_bytes))
        read_rows = max(1, min(LOCAL_READ_ROWS, most_rows) // batch_rows) * batch_rows
        with ThreadPoolExecutor(1, thread_name_prefix="rayprune-read") as reader:
            pending: deque[tuple[Future[tuple[Columns, int]], RankRows]] = deque()
            for ids, weights, real in spans:
                for start in range(0, ids.size, read_rows):
                    rows = slice(start, start + read_rows)
                    read = reader.submit(self._read, source, ids[rows])
                    pending.append((read, (ids[rows], weights[rows], real[rows])))
                    if len(pending) > _PREFETCHED:
                        yield from _cut_read(*pending.popleft(), batch_rows)
            for read, rank_rows in pending:
                yield from _cut_read(read, rank_rows, batch_rows)

    def _read(self, source: SampleSource, ids: NDArray[np.int64]) -> tuple[Columns, int]:
        columns, num_bytes = source.read(ids)
        if self._convert is None:
            return columns, num_bytes
        return {name: self._convert(column) for name, column in columns.items()}, num_bytes


def _cut_read(read: Future[tuple[Columns, int]], rank_rows: RankRows, batch_rows: int) -> Iterator[Batch]:
    (columns, num_bytes), (ids, weights, real) = read.result(), rank_rows
    for start in range(0, ids.size, batch_rows):
        rows = slice(start, start + batch_rows)
        batch = {name: column[rows] for name, column in columns.items()}
        yield Batch(batch, ids[rows], weights[rows], real[rows], 0 if start else num_bytes)


class RayStream:
    """Takes rows from this rank's split of a Ray Data stream and checks them against the plan.

    Args:
        shard: the split.
        convert: applied to each column of a block in the fetching thread, ids and weights excepted.
        ragged: the ragged columns, because Ray makes a matrix of rows that have one length in a block.
    """

    resumes_inside = True

    def __init__(self, shard: Any, convert: Convert | None = None, ragged: Collection[str] = ()) -> None:
        self._shard, self._convert, self._ragged = shard, convert, ragged

    def batches(self, plan_pass: PlanPass, spans: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        # Whole blocks, cut here: Ray's own cutting costs half a millisecond per batch. Prefetched here: Ray hands out
        # the first block only when all blocks it prefetches have come, and prefetch_batches=0 leaks a thread.
        blocks = iter(self._shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))
        converted = (self._converted(block) for block in blocks)
        batches = _cut_blocks(prefetch(converted, _PREFETCHED, "rayprune-blocks", join=False), batch_rows)
        where = f"epoch {plan_pass.key.epoch}, {plan_pass.phase}"
        for ids, weights, real in spans:
            for start in range(0, ids.size, batch_rows):
                rows = slice(start, start + batch_rows)
                columns, num_bytes = next(batches, (None, 0))
                if columns is None or not np.array_equal(columns["id"], ids[rows]):
                    raise PlanMismatch(f"{where}: {_difference(columns, ids[rows])}; {_CURE}")
                yield Batch(columns, ids[rows], weights[rows], real[rows], num_bytes)
        if next(batches, None) is not None:
            raise PlanMismatch(f"{where}: the stream holds more rows than the plan")

    def _converted(self, block: dict[str, NDArray[Any]]) -> Columns:
        for name in self._ragged:
            if name in block and block[name].dtype != object:
                block = {**block, name: object_array(block[name])}
        if self._convert is None:
            return block
        return {name: column if name in _HOST_COLUMNS else self._convert(column) for name, column in block.items()}


def _difference(columns: Columns | None, planned_B: NDArray[np.int64]) -> str:
    """Say where the ids of a batch differ from the planned ones."""
    if columns is None:
        return f"the stream ended before id {planned_B[0]}"
    came = np.asarray(columns["id"])
    shared = min(came.size, planned_B.size)
    differs = np.flatnonzero(came[:shared] != planned_B[:shared])
    if not differs.size:
        return f"a batch came with {came.size} rows instead of {planned_B.size}"
    row, stop = int(differs[0]), int(differs[0]) + 3
    return (
        f"from row {row} of a batch on, ids {came[row:stop].tolist()}… came instead of {planned_B[row:stop].tolist()}…"
    )


def _cut_blocks(blocks: Iterator[Columns], batch_rows: int) -> Iterator[tuple[Columns, int]]:
    """Cut blocks, which hold whole steps, into batches and the bytes that were read for each."""
    for block in blocks:
        if "id" not in block:
            raise PlanMismatch("the batches have lost their column 'id': keep id and weight in map_batches")
        bytes_read = block.get(BYTES_READ, np.zeros(0, np.int64))
        columns = {name: column for name, column in block.items() if name != BYTES_READ}
        for start in range(0, len(block["id"]), batch_rows):
            rows = slice(start, start + batch_rows)
            yield {name: column[rows] for name, column in columns.items()}, int(bytes_read[rows].sum())


def prefetch(items: Iterator[T], depth: int, name: str, *, join: bool = True) -> Iterator[T]:
    """Yield items that a thread fetches up to `depth` items ahead.

    Args:
        items: their errors are raised in the item's place.
        depth: at least 1.
        name: the thread's name.
        join: if the consumer stops early, wait for the current fetch and close `items`. Pass False if an item may never
            come.
    """
    end, is_finalizing = object(), sys.is_finalizing  # a local name: those of modules go while the interpreter exits
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    pending: deque[Future[object]] = deque(pool.submit(next, items, end) for _ in range(depth))
    try:
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # everything but `end` is a T
    finally:
        if not is_finalizing():
            pool.shutdown(wait=join, cancel_futures=True)
            if join and isinstance(items, Generator):
                items.close()
