"""The parts of the Ray Data stream that need no Ray: task sizes, read tasks, id columns. See also tests/integration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.data.block import BlockAccessor

from rayprune.core import Plan, Selection
from rayprune.engine.data.ray_data import (
    FilteredStream,
    KeepWantedRows,
    PlanDatasource,
    SourceMetadata,
    _checked_ids,
    _ReadBlock,
    task_rows,
)
from rayprune.engine.data.transport import RayStream
from rayprune.engine.scoring.client import LoopClient, ScoreClient
from rayprune.engine.scoring.messages import PlanPass
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.errors import DataError, PlanMismatch
from rayprune.sources import MemorySource, open_data
from tests.support.runs import pass_of

SOURCE = open_data("digits", limit=301).train


class Expensive:
    """A source of rows that are decoded; only its size is looked at."""

    row_cost, groups = "expensive", None

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def test_rows_that_are_decoded_are_spread_over_the_cpus() -> None:
    decoded: Any = Expensive(100_000)
    assert [task_rows(decoded, cpus) for cpus in (1, 8, 16, 64)] == [8_192, 6_250, 3_125, 2_048]


@pytest.mark.parametrize(("size", "rows"), [(50_000_000, 12_207), (10**9, 32_768)])
def test_large_data_has_a_limited_number_of_tasks(size: int, rows: int) -> None:
    decoded: Any = Expensive(size)
    assert task_rows(decoded, 64) == rows, "planning each task costs Ray time"


def test_cheap_rows_make_large_tasks() -> None:
    assert SOURCE.row_cost == "cheap"
    assert task_rows(SOURCE, 64) == 32_768


def test_read_tasks_return_the_planned_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    # In Ray's object store the source would need a running Ray.
    monkeypatch.setattr("rayprune.engine.data.ray_data.in_object_store", lambda source: source)
    spec = ScoreSpec({"name": "full"}, SOURCE, 37, 3, 5, 32, "pad", SOURCE.schema.row_bytes, None, 0, task_rows=64)
    scores = ScoreClient.in_process(spec)
    datasource = PlanDatasource(scores, {"train": SOURCE})
    assert datasource.get_read_tasks(2) == [], "there is no plan before the first pass"
    (refusing,) = PlanDatasource(LoopClient.in_process(spec), {"train": SOURCE}).get_read_tasks(2)
    with pytest.raises(RuntimeError, match=r"replace ray\.train\.get_dataset_shard by rayprune\.get_dataset_shard"):
        list(refusing())
    scores.announce(pass_of(0, "train", 1))
    tables = [block for task in datasource.get_read_tasks(2) for block in task()]
    plan = Plan.of_selection(Selection.full(301), 32, 5, 0)
    ids, weights, _ = plan.rank_rows(0, 1, 0, plan.num_steps)
    assert len(tables) > 1
    assert np.concatenate([table["id"].to_numpy() for table in tables]).tolist() == ids.tolist()
    assert np.concatenate([table["weight"].to_numpy() for table in tables]).tolist() == weights.tolist()
    labels = np.concatenate([table["label"].to_numpy() for table in tables])
    assert labels.tolist() == SOURCE.labels[ids].tolist()


def test_ragged_rows_text_and_objects_travel_through_arrow_as_they_are() -> None:
    columns = {
        "tokens": [[1, 2], [3], [], [4, 5, 6]],
        "image": [np.full((2, width, 3), width, np.uint8) for width in (1, 2, 3, 4)],
        "half": [np.ones(length, np.float16) for length in (1, 0, 2, 1)],
        "text": ["a", None, "ä", ""],
        "raw": [b"a", b"\0", None, b""],
        "meta": [{"x": 1}, ["a", ["b"]], None, "y"],
        "x": np.arange(4.0),
    }
    source = MemorySource(columns)
    # In the second task, the rows of ragged columns have one length.
    for ids in ([3, 0, 1], [2], [1, 1], [0, 0]):
        chosen, weights = np.array(ids), np.ones(len(ids), np.float32)
        (block,) = _ReadBlock(source, chosen, weights)()
        stream = RayStream(Blocks([BlockAccessor.for_block(block).to_numpy()]), ragged=("tokens", "image", "half"))
        (batch,) = stream.batches(pass_of(0, "train", 1), iter([(chosen, weights, chosen >= 0)]), 8)
        expected = source.take(chosen)
        for name, column in source.schema.columns.items():
            values: Any = batch.columns[name]
            assert values.dtype == expected[name].dtype
            if column.is_ragged:
                for row, other in zip(values, expected[name], strict=True):
                    assert row.dtype == other.dtype
                    np.testing.assert_array_equal(row, other, strict=True)
            else:
                assert values.tolist() == expected[name].tolist()


class Blocks:
    """The iterator of a worker over blocks."""

    def __init__(self, blocks: list[Any]) -> None:
        self.blocks = blocks

    def iter_batches(self, **options: Any) -> list[Any]:
        return self.blocks


def test_rows_of_one_length_stay_ragged() -> None:
    """Ray makes a matrix of them when a map of the user returns them."""
    rows = {"id": np.arange(2), "weight": np.ones(2, np.float32), "tokens": np.ones((2, 3), np.int64)}
    stream = RayStream(Blocks([rows]), ragged=("tokens", "dropped"))
    (batch,) = stream.batches(pass_of(0, "train", 1), iter([(rows["id"], rows["weight"], rows["id"] >= 0)]), 2)
    tokens: Any = batch.columns["tokens"]
    assert (tokens.dtype, [row.tolist() for row in tokens]) == (object, [[1, 1, 1], [1, 1, 1]])


def test_the_actor_gets_the_labels_only_if_it_needs_them() -> None:
    metadata = SourceMetadata(SOURCE, labeled=True)
    assert (len(metadata), metadata.fingerprint) == (len(SOURCE), SOURCE.fingerprint)
    assert np.array_equal(metadata.labels, SOURCE.labels)
    with pytest.raises(RuntimeError, match="was sent no labels"):
        _ = SourceMetadata(SOURCE, labeled=False).labels
    with pytest.raises(RuntimeError, match="reads no rows"):
        metadata.take(np.arange(3))


def test_ids_of_a_dataset_may_come_in_any_order() -> None:
    ids = np.random.default_rng(0).permutation(9).astype(np.int32)
    assert np.array_equal(_checked_ids(ids, "key"), ids)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.array([0.0, 1.0]), "column 'key' of the Dataset is float64: ids must be integers"),
        (np.array([0, 1, 1]), r"must hold each id of 0..2 once: repeated \[1\], missing \[2\]"),
        (np.array([0, 3, 1]), r"missing \[2\], outside \[3\]"),
    ],
)
def test_wrong_ids_of_a_dataset_are_named(ids: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        _checked_ids(ids, "key")


class WantedRows:
    """A client of an actor that wants the rows 1 (weight 2) and 3 (weight 1)."""

    name = "test_ray_data"

    def wanted_rows(self, known: PlanPass | None) -> Any:
        codes = np.array([0, 1, 0, 2, 0], dtype=np.uint8)
        return pass_of(0, "train", 1), codes, np.array([2.0, 1.0], dtype=np.float32)


def test_a_filtered_block_keeps_the_wanted_rows_with_their_weights() -> None:
    scores: Any = WantedRows()
    table = pa.table({"key": [4, 3, 1, 0], "x": [40, 30, 10, 0]})
    kept = KeepWantedRows(scores, "key")(table)
    assert kept.to_pydict() == {"key": [3, 1], "x": [30, 10], "id": [3, 1], "weight": [1.0, 2.0]}


def test_a_stream_that_lost_its_ids_is_refused() -> None:
    class Shard:
        def iter_batches(self, **_: Any) -> Any:
            yield {"x": np.zeros(4), "weight": np.ones(4)}

    with pytest.raises(PlanMismatch, match="have lost their column 'id'"):
        next(FilteredStream(Shard()).batches(pass_of(0, "train", 1), iter(()), 4))
