"""Ids for a `ray.data.Dataset` that has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data.expressions import monotonically_increasing_id

from rayprune.errors import DataError

IS_NUMBERED = "rayprune_ids"  # the key in a DataContext of Datasets whose ids need preserve_order
_POSITION = "__position"
_ROW_BITS = 33  # of a position; those above are the task's


def with_ids(dataset: Any, id_column: str = "id") -> Any:
    """Number the rows of a `ray.data.Dataset` 0..N−1 in its order, for `prune`.

    One pass over the Dataset counts the rows of each task; only the counts reach this process. The ids are added lazily
    and anew at each execution. They stay the same only if the Dataset delivers the same rows in the same order every
    time. `with_ids` therefore sets `preserve_order` in the Dataset's and the current DataContext, and `prune` refuses a
    trainer's DataConfig without it. Whatever is random, such as `random_shuffle`, needs a seed, or `materialize()`
    before `with_ids`.

    Args:
        dataset: a ray.data.Dataset.
        id_column: the name of the new column, int64.

    Returns:
        The Dataset with the column. Reading it raises a DataError if a task has other rows than were counted.

    Raises:
        DataError: the Dataset has no rows, or such a column already.
    """
    schema = dataset.schema()
    if schema is not None and id_column in schema.names:
        raise DataError(f"the Dataset has a column {id_column!r} already: give with_ids another id_column")
    # A copy with its own context: the options of the original stay.
    dataset = ray.data.Dataset.copy(dataset, _deep_copy=True)
    for context in (dataset.context, ray.data.DataContext.get_current()):
        context.execution_options.preserve_order = True
    dataset.context.set_config(IS_NUMBERED, True)
    positioned = dataset.with_column(_POSITION, monotonically_increasing_id())
    counted = positioned.map_batches(_count_tasks, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
    counts: dict[int, int] = {}
    for row in counted.take_all():
        counts[row["task"]] = max(counts.get(row["task"], 0), row["count"])
    if not counts:
        raise DataError("the Dataset has no rows: give one that has some")
    tasks = np.array(sorted(counts), dtype=np.int64)
    ends = np.cumsum([counts[task] for task in tasks.tolist()])
    number = _NumberRows(id_column, tasks, np.concatenate([[0], ends]))
    return positioned.map_batches(number, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def _count_tasks(table: pa.Table) -> pa.Table:
    """Return the tasks of a block's rows, and the rows of each task up to the end of the block."""
    positions = np.asarray(table.column(_POSITION))
    tasks, last = np.unique(positions[::-1] >> _ROW_BITS, return_index=True)
    rows = positions[::-1][last] & ((1 << _ROW_BITS) - 1)
    return pa.table({"task": tasks, "count": rows + 1})


@dataclass(frozen=True)
class _NumberRows:
    """Replaces the positions of a block's rows by their ids."""

    id_column: str
    tasks: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with the ids of its rows (B,)."""
        positions = np.asarray(table.column(_POSITION))
        tasks, rows = positions >> _ROW_BITS, positions & ((1 << _ROW_BITS) - 1)
        index = np.minimum(np.searchsorted(self.tasks, tasks), len(self.tasks) - 1)
        ids = self.starts[index] + rows
        if (self.tasks[index] != tasks).any() or (ids >= self.starts[index + 1]).any():
            raise DataError(
                "the Dataset was read in other parts than when with_ids counted its rows: call materialize() before "
                "with_ids"
            )
        return table.drop_columns([_POSITION]).append_column(self.id_column, pa.array(ids))
