"""The score table: column dtypes, and the permuted view."""

from __future__ import annotations

import numpy as np
import pytest

from rayprune.core import ScoreTable


@pytest.mark.parametrize(
    ("num_epochs", "dtype"), [(1, np.uint8), (255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_the_counter_of_prunings_is_wide_enough(num_epochs: int, dtype: type) -> None:
    table = ScoreTable(3, {"loss": np.float32, "window": (np.float16, (4,)), "count": np.int32}, num_epochs)
    assert table.times_pruned.dtype == dtype
    assert np.iinfo(dtype).max >= num_epochs
    assert np.isnan(table["window"]).all()
    assert table["window"].shape == (3, 4)
    assert (table["count"] == 0).all()


def test_a_permuted_table_moves_rows_and_leaves_the_original() -> None:
    table = ScoreTable(4, {"loss": np.float32, "window": (np.float32, (2,))}, 5)
    table["loss"][:] = [0, 1, 2, 3]
    table["window"][:, 0] = [0, 10, 20, 30]
    table.last_visit[:] = [4, 3, 2, -1]
    table.times_pruned[:] = [1, 2, 3, 4]
    permuted = table.permuted(np.array([3, 0, 1, 2]))
    assert permuted["loss"].tolist() == [3, 0, 1, 2]
    assert permuted["window"][:, 0].tolist() == [30, 0, 10, 20]
    assert permuted.last_visit.tolist() == [-1, 4, 3, 2]
    assert permuted.times_pruned.tolist() == [1, 2, 3, 4]
    permuted["loss"][:] = 9
    assert table["loss"].tolist() == [0, 1, 2, 3]
