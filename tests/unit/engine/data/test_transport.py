"""The local transport: a plan's batches in the plan's order, and the source's own errors.

Items fetched ahead come in order, the first as soon as it is there, and nothing is left running.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from rayprune.core import Plan, Selection
from rayprune.engine.data import transport as stream
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import LocalStream, prefetch
from rayprune.engine.scoring import session
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import PlanPass
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.sources import SampleSource, Schema, open_data
from tests.support.runs import pass_of, stream_pass

SOURCE = open_data("digits", limit=301).train
SEED = 5


def scores_for(batch_size: int, last_batch: str = "pad") -> ScoreClient:
    spec = ScoreSpec({"name": "full"}, SOURCE, 37, 3, SEED, batch_size, last_batch, 72, None, 0)
    return ScoreClient.in_process(spec)


def read(batch_size: int, plan_pass: PlanPass, rank: int = 0, source: SampleSource = SOURCE) -> list[Batch]:
    scores = scores_for(batch_size)
    via = LocalStream({"train": source, "validation": source})
    return list(stream_pass(scores, plan_pass, via, rank))


def assert_batches_are(batches: list[Batch], plan: Plan, world_size: int, rank: int, start_step: int = 0) -> None:
    """Every batch is this rank's slice of its global batch, columns included."""
    assert len(batches) == plan.num_steps - start_step
    for step, batch in enumerate(batches, start_step):
        ids, weights, real = plan.rank_rows(rank, world_size, step, step + 1)
        assert np.array_equal(batch.ids, ids)
        assert np.array_equal(batch.weights, weights)
        assert np.array_equal(batch.real, real)
        expected = SOURCE.take(ids)
        assert batch.columns.keys() == expected.keys()
        assert all(np.array_equal(batch.columns[name], expected[name]) for name in expected)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 96, 300, 301, 302])
@pytest.mark.parametrize(("read_rows", "span_rows"), [(16, 50), (2_048, 65_536)])
def test_batches_follow_the_plan(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, read_rows: int, span_rows: int
) -> None:
    monkeypatch.setattr(stream, "LOCAL_READ_ROWS", read_rows)
    monkeypatch.setattr(session, "SPAN_ROWS", span_rows)
    plan = Plan.of_selection(Selection.full(301), batch_size, SEED, 0)
    assert_batches_are(read(batch_size, pass_of(0, "train", 1)), plan, 1, 0)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("start_step", [0, 1, 5, 25, 26])
def test_a_start_step_gives_the_tail(monkeypatch: pytest.MonkeyPatch, rank: int, start_step: int) -> None:
    monkeypatch.setattr(session, "SPAN_ROWS", 20)
    plan = Plan.of_selection(Selection.full(301), 12, SEED, 0)
    assert plan.num_steps == 26
    batches = read(12, pass_of(0, "train", 3, start_step), rank)
    assert_batches_are(batches, plan, 3, rank, start_step)


def test_validation_visits_every_row_once() -> None:
    batches = read(8, pass_of(0, "validate", 2), 0) + read(8, pass_of(0, "validate", 2), 1)
    ids = np.concatenate([batch.ids[batch.real] for batch in batches])
    assert np.sort(ids).tolist() == list(range(37))
    assert sum(batch.ids.size for batch in batches) == 40


@dataclass(frozen=True)
class Unreadable(SampleSource):
    """The digits with one sample that can't be read."""

    bad: int

    def __len__(self) -> int:
        return len(SOURCE)

    @property
    def schema(self) -> Schema:
        return SOURCE.schema

    @property
    def fingerprint(self) -> str:
        return SOURCE.fingerprint

    @property
    def labels(self) -> np.ndarray:
        return SOURCE.labels

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        if self.bad in ids:
            raise OSError(f"sample {self.bad} is damaged")
        return SOURCE.take(ids)


def test_an_error_of_the_source_is_raised_at_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOCAL_READ_ROWS", 8)
    plan = Plan.of_selection(Selection.full(301), 8, SEED, 0)
    source = Unreadable(int(plan.order[100]))
    scores, plan_pass = scores_for(8), pass_of(0, "train", 1)
    batches = stream_pass(scores, plan_pass, LocalStream({"train": source}))
    for step in range(100 // 8):
        assert np.array_equal(next(batches).ids, plan.order[step * 8 : step * 8 + 8])
    with pytest.raises(OSError, match=f"sample {source.bad} is damaged"):
        next(batches)


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_all_items_come_in_order(depth: int) -> None:
    assert list(prefetch(iter(range(9)), depth, "test")) == list(range(9))
    assert list(prefetch(iter(()), depth, "test")) == []


def test_the_first_item_does_not_wait_for_others_and_the_next_is_prefetched() -> None:
    held, fetched = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        fetched.set()
        assert held.wait(20)
        yield 1

    got = prefetch(items(), 2, "test")
    assert next(got) == 0
    assert fetched.wait(20), "nobody fetches while the first item is used"
    held.set()
    assert list(got) == [1]


def test_an_error_is_raised_at_its_item() -> None:
    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("the disk is gone")

    got = prefetch(items(), 4, "test")
    assert [next(got), next(got)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(got)


def test_stopping_early_closes_the_items_and_leaves_no_thread() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    got = prefetch(items(), 2, "test-early")
    assert next(got) == 0
    got.close()  # type: ignore[attr-defined]  # a generator
    assert closed.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-early")]


def test_closing_does_not_wait_for_pending_items() -> None:
    held = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        held.wait(20)

    got = prefetch(items(), 2, "test-stuck", join=False)
    assert next(got) == 0
    got.close()  # type: ignore[attr-defined]
    (stuck,) = (thread for thread in threading.enumerate() if thread.name.startswith("test-stuck"))
    held.set()
    stuck.join(20)
    assert not stuck.is_alive(), "it ends when the item has come after all"
