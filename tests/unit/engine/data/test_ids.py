"""Positions of rows, which tasks and blocks of them give, become ids."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rayprune.engine.data.ids import _POSITION, _count_tasks, _NumberRows

TASK = 1 << 33


def positions(*values: int) -> pa.Table:
    return pa.table({"x": np.arange(len(values)), _POSITION: np.array(values, dtype=np.int64)})


def test_tasks_are_counted_up_to_the_end_of_a_block() -> None:
    table = _count_tasks(positions(5, 6, 3 * TASK, 3 * TASK + 1, 3 * TASK + 2))
    assert table.to_pydict() == {"task": [0, 3], "count": [7, 3]}
    assert _count_tasks(positions()).num_rows == 0


def test_rows_are_numbered_in_the_order_of_tasks_and_rows() -> None:
    number = _NumberRows("key", np.array([0, 3]), np.array([0, 7, 10]))
    table = number(positions(3 * TASK + 1, 0, 6, 3 * TASK + 2))
    assert table.column_names == ["x", "key"]
    assert table["key"].to_pylist() == [8, 0, 6, 9]
    assert number(positions()).num_rows == 0


@pytest.mark.parametrize("position", [7, 3 * TASK + 3, TASK, 4 * TASK])
def test_rows_that_were_not_counted_are_refused(position: int) -> None:
    number = _NumberRows("id", np.array([0, 3]), np.array([0, 7, 10]))
    with pytest.raises(ValueError, match=r"read in other parts .*: call materialize\(\) before with_ids"):
        number(positions(0, position))
