"""The transports of a plan, one interface: this rank's batches, in the plan's order.

`stream: ray`: decoded rows travel through Ray Data (`rayprune.engine.data.ray_data`) and workers never open the source.
`stream: local`: the worker reads its rows from the SampleSource, a thread ahead. `stream: device`, whose rows lie on
the device, has a module of its own.

Items fetched in a thread before they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rayprune.engine.data.batch import Batch, Columns
from rayprune.engine.scoring.messages import PlanPass, RankRows
from rayprune.errors import PlanMismatch
from rayprune.sources import SampleSource

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int, name: str, *, join: bool = True) -> Iterator[T]:
    """Yield items as they come, fetched in a thread up to `depth` of them before they are asked for.

    Args:
        items: whose errors are raised where their item would have come.
        depth: at least 1.
        name: of the thread.
        join: where the consumer stops early, wait for the fetch under way and close `items`. False for items that may
            never come.
    """
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    waiting: deque[Future[object]] = deque(pool.submit(next, items, end) for _ in range(depth))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # all but the end are T
    finally:
        pool.shutdown(wait=join, cancel_futures=True)
        if join and isinstance(items, Generator):
            items.close()


_Rows = tuple[Columns, int]
Made = Callable[["NDArray[Any]"], "NDArray[Any] | Tensor"]

LOCAL_READ_ROWS = 2_048
_LOCAL_READ_BYTES = 16 * 1024 * 1024
_AHEAD = 2
_CURE = (
    "a data set that is mapped over must keep rows and order: map_batches(…, batch_size=None), no filter, no shuffle"
)
# A user's map may see it and must not mistake it for a column of the data.
BYTES_READ = "__bytes_read"
_OWN = ("id", "weight", BYTES_READ)  # columns that are looked at on the host


class Transport(Protocol):
    """Deliver the rows of this rank's shares, batch after batch.

    Attributes:
        resumes_inside: whether a pass may begin at any step of a plan.
    """

    resumes_inside: bool

    def batches(self, plan_pass: PlanPass, shares: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """Yield one Batch for each `batch_rows` rows of the shares, in order.

        Raises:
            PlanMismatch: other rows came than the plan says.
        """


class LocalStream:
    """Read rows in this process, a thread ahead of training.

    Args:
        sources: "train" and, where there is one, "validation".
        made: what the reading thread makes of each column of many rows; None leaves it an array.
    """

    resumes_inside = True

    def __init__(self, sources: Mapping[str, SampleSource], made: Made | None = None) -> None:
        self._sources, self._made = sources, made

    def batches(self, plan_pass: PlanPass, shares: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        source = self._sources["validation" if plan_pass.phase == "validate" else "train"]
        budget = max(1, _LOCAL_READ_BYTES // max(1, source.schema.row_bytes))
        read_rows = max(1, min(LOCAL_READ_ROWS, budget) // batch_rows) * batch_rows
        with ThreadPoolExecutor(1, thread_name_prefix="rayprune-read") as reader:
            waiting: list[tuple[Future[_Rows], RankRows]] = []
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


def _cut(read: Future[_Rows], share: RankRows, batch_rows: int) -> Iterator[Batch]:
    (columns, num_bytes), (ids, weights, real) = read.result(), share
    for start in range(0, ids.size, batch_rows):
        part = slice(start, start + batch_rows)
        cut = {name: column[part] for name, column in columns.items()}
        yield Batch(cut, ids[part], weights[part], real[part], 0 if start else num_bytes)


class RayStream:
    """Take rows from this rank's split of the Ray Data stream and check them against the plan.

    Args:
        shard: the split.
        made: what the thread that fetches blocks makes of each of their columns; None leaves it an array.
    """

    resumes_inside = True

    def __init__(self, shard: Any, made: Made | None = None) -> None:
        self._shard, self._made = shard, made

    def batches(self, plan_pass: PlanPass, shares: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport."""
        # Whole blocks, cut here: Ray's own cutting costs half a millisecond a batch. And fetched ahead here: Ray gives
        # the first one only when all that it fetches ahead have come. With 0 it leaves a thread behind each time.
        blocks = iter(self._shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))
        made = (self._made_of(block) for block in blocks)
        cut = _cut_blocks(prefetch(made, _AHEAD, "rayprune-blocks", join=False), batch_rows)
        for ids, weights, real in shares:
            for start in range(0, ids.size, batch_rows):
                part = slice(start, start + batch_rows)
                columns, num_bytes = next(cut, (None, 0))
                if columns is None or not np.array_equal(columns["id"], ids[part]):
                    got = "the stream ended" if columns is None else f"ids {columns['id'][:3].tolist()}… came"
                    raise PlanMismatch(
                        f"epoch {plan_pass.key.epoch}, {plan_pass.phase}: {got}, not {ids[part][:3].tolist()}…; {_CURE}"
                    )
                yield Batch(columns, ids[part], weights[part], real[part], num_bytes)
        if next(cut, None) is not None:
            raise PlanMismatch(
                f"epoch {plan_pass.key.epoch}, {plan_pass.phase}: the stream holds more rows than the plan"
            )

    def _made_of(self, block: dict[str, NDArray[Any]]) -> Columns:
        if self._made is None:
            return block
        return {name: column if name in _OWN else self._made(column) for name, column in block.items()}


def _cut_blocks(blocks: Iterator[Columns], batch_rows: int) -> Iterator[tuple[Columns, int]]:
    """Cut blocks, which are whole steps, into batches, each with the bytes that were read for it."""
    for block in blocks:
        if "id" not in block:
            raise PlanMismatch("the batches have lost their column 'id': keep id and weight in map_batches")
        read = block.get(BYTES_READ, np.zeros(0, np.int64))
        columns = {name: column for name, column in block.items() if name != BYTES_READ}
        for start in range(0, len(block["id"]), batch_rows):
            part = slice(start, start + batch_rows)
            yield {name: column[part] for name, column in columns.items()}, int(read[part].sum())
