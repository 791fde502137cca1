"""The stream through Ray Data, and the traps of Ray that it works around; each trap has its own test.

Shapes: N samples, W ranks.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.train import DataConfig

from rayprune.core import Plan, Selector
from rayprune.core.plan import BLOCK_BYTES
from rayprune.engine.cluster import start_ray
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.ray_data import PlanDatasource, plan_dataset
from rayprune.engine.data.transport import RayStream
from rayprune.engine.scoring import session
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, Phase, RankRows
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.errors import PlanMismatch
from rayprune.methods import build_method
from rayprune.sources import open_data
from rayprune.sources.memory import RowSource
from tests.support.runs import close_epoch, pass_of, stream_pass

METHOD = {"name": "random_epoch", "prune_ratio": 0.4}
SEED, EPOCHS = 3, 3


def sources_of(num_samples: int) -> dict[str, Any]:
    """Open the first `num_samples` digits."""
    splits = open_data("digits", limit=num_samples)
    return {"train": splits.train, "validation": splits.validation}


def spec_of(num_samples: int, batch_size: int, row_bytes: int = 72) -> ScoreSpec:
    """Return the spec of a ScoreActor over the first digits, with 7 validation rows."""
    train = sources_of(num_samples)["train"]
    return ScoreSpec(METHOD, train, 7, EPOCHS, SEED, batch_size, "pad", row_bytes, None, 0)


@contextmanager
def score_actor(spec: ScoreSpec) -> Iterator[ScoreClient]:
    """Run a ScoreActor for the with-block."""
    scores, (handle,) = ScoreClient.start(spec, f"test-scores-{uuid.uuid4().hex[:8]}")
    try:
        yield scores
    finally:
        ray.kill(handle)


def plans_of(num_samples: int, batch_size: int) -> list[Plan]:
    """Return the plans of the same epochs, made without Ray."""
    selector = Selector(build_method(METHOD), num_samples, EPOCHS, SEED)
    return [Plan.of_selection(selector.begin_epoch(epoch), batch_size, SEED, epoch) for epoch in range(EPOCHS)]


def stream_ranks(scores: ScoreClient, shards: list[Any], epoch: int, phase: Phase) -> list[list[Batch]]:
    """Read one pass on all ranks concurrently, as workers do; return each rank's batches."""
    plan_pass = pass_of(epoch, phase, len(shards))
    scores.announce(plan_pass)

    def read(rank: int) -> list[Batch]:
        return list(stream_pass(scores, plan_pass, RayStream(shards[rank]), rank))

    with ThreadPoolExecutor(len(shards)) as pool:
        return list(pool.map(read, range(len(shards))))


def assert_rank_batches(batches: list[Batch], plan: Plan, rank: int, ranks: int, source: Any) -> None:
    assert len(batches) == plan.num_steps
    for step, batch in enumerate(batches):
        ids, weights, real = plan.rank_rows(rank, ranks, step, step + 1)
        assert np.array_equal(batch.ids, ids)
        assert np.array_equal(batch.columns["id"], ids)
        assert batch.columns["id"].dtype == np.int64
        assert np.array_equal(batch.columns["weight"], weights)
        assert np.array_equal(batch.real, real)
        assert np.array_equal(batch.columns["image"], source.take(ids)["image"])


@pytest.mark.parametrize(("num_samples", "batch_size", "ranks"), [(11, 4, 2), (97, 6, 3)])
def test_one_stream_serves_every_epoch_and_rank(
    monkeypatch: pytest.MonkeyPatch, num_samples: int, batch_size: int, ranks: int
) -> None:
    monkeypatch.setattr(session, "SPAN_ROWS", 10)  # ranks fetch their rows several times per epoch
    sources = sources_of(num_samples)
    with score_actor(spec_of(num_samples, batch_size)) as scores:
        shards = plan_dataset(scores, sources).streaming_split(ranks, equal=True)
        for epoch, plan in enumerate(plans_of(num_samples, batch_size)):
            by_rank = stream_ranks(scores, shards, epoch, "train")
            for rank, batches in enumerate(by_rank):
                assert_rank_batches(batches, plan, rank, ranks, sources["train"])
            batches = [batch for of_rank in by_rank for batch in of_rank]
            assert sum(batch.num_bytes for batch in batches) == plan.order.size * 72, "every row's bytes are counted"
            assert "__bytes_read" not in batches[0].columns
            assert real_ids(by_rank) == plan.selection.ids.tolist(), (
                "the union of the ranks is the selection, each id once"
            )
            assert real_ids(stream_ranks(scores, shards, epoch, "validate")) == list(range(7))
            assert close_epoch(scores, AttemptKey(1, epoch), *[0] * ranks) is not None


def real_ids(by_rank: list[list[Batch]]) -> list[int]:
    """Return the ids of all ranks without padding, sorted."""
    ids: list[int] = np.concatenate([batch.ids[batch.real] for batches in by_rank for batch in batches]).tolist()
    return sorted(ids)


def test_many_small_blocks_keep_their_order() -> None:
    # Rows of 8 MB (on paper) make blocks of two steps, whose read tasks end in any order.
    sources = sources_of(301)
    with score_actor(spec_of(301, 8, row_bytes=8 * 1024 * 1024)) as scores:
        shards = plan_dataset(scores, sources).streaming_split(2, equal=True)
        plan = plans_of(301, 8)[0]
        for rank, batches in enumerate(stream_ranks(scores, shards, 0, "train")):
            assert_rank_batches(batches, plan, rank, 2, sources["train"])
        assert len(scores.blocks()[1]) >= 20


@pytest.mark.parametrize("sent_once", [True, False])
def test_trap_a_large_read_task_without_a_name_fails(monkeypatch: pytest.MonkeyPatch, sent_once: bool) -> None:
    """A source that holds its data is sent once; Ray names the task when it warns about a large one."""
    digits = sources_of(97)["train"]
    rows = partial(digits.take, np.arange(97))
    heavy = RowSource(rows, digits.schema, digits.fingerprint, np.asarray(digits.labels))
    vars(heavy)["ballast"] = bytes(3 * 2**20)  # travels with the source
    if not sent_once:
        monkeypatch.setattr("rayprune.engine.data.ray_data._LARGE_SOURCE_BYTES", 2**40)
    with score_actor(spec_of(97, 6)) as scores:
        shards = plan_dataset(scores, {"train": heavy}).streaming_split(2, equal=True)
        plan = plans_of(97, 6)[0]
        for rank, batches in enumerate(stream_ranks(scores, shards, 0, "train")):
            assert_rank_batches(batches, plan, rank, 2, digits)
        tasks = PlanDatasource(scores, {"train": heavy}).get_read_tasks(1)
        assert (len(ray.cloudpickle.dumps(tasks[0])) < 2**20) == sent_once


def test_trap_order_is_set_in_the_data_context_before_the_trainer_exists() -> None:
    # TorchTrainer's DataConfig takes its options from the context and overwrites those of the Dataset.
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = False
    assert not DataConfig.default_ingest_options().preserve_order
    plan_dataset(ScoreClient.in_process(spec_of(11, 4)), sources_of(11))
    assert context.execution_options.preserve_order
    assert DataConfig.default_ingest_options().preserve_order


def client_at_first_pass(num_samples: int = 11, row_bytes: int = 72, batch_size: int = 4) -> ScoreClient:
    """Return an in-process client that has announced the first pass, for two ranks."""
    scores = ScoreClient.in_process(spec_of(num_samples, batch_size, row_bytes))
    scores.announce(pass_of(0, "train", 2))
    return scores


def test_trap_row_counts_of_the_first_plan_would_be_cached() -> None:
    datasource = PlanDatasource(client_at_first_pass(), sources_of(11))
    tasks = datasource.get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [None, None]
    assert [task.metadata.size_bytes for task in tasks] == [None, None]
    assert datasource.estimate_inmemory_data_size() is None


def test_trap_planning_happens_early_and_often() -> None:
    scores = ScoreClient.in_process(spec_of(11, 4))
    datasource = PlanDatasource(scores, sources_of(11))
    assert datasource.get_read_tasks(1) == [], "there is nothing to read before the first pass"
    assert datasource.get_read_tasks(200) == []
    scores.announce(pass_of(0, "train", 2))
    first, again = (read_ids(datasource.get_read_tasks(parallelism)) for parallelism in (1, 200))
    assert first == again
    plan = plans_of(11, 4)[0]
    assert first == [plan.rank_rows(rank, 2, 0, plan.num_steps)[0].tolist() for rank in (0, 1)]


def read_ids(tasks: list[Any]) -> list[list[int]]:
    """Run read tasks in this process; return the ids of each block."""
    return [block.column("id").to_pylist() for task in tasks for block in task()]


@pytest.mark.parametrize("row_bytes", [72, 3_072, 150_528, 40_000_000])
def test_trap_ray_splits_blocks_above_its_target(row_bytes: int) -> None:
    assert ray.data.DataContext.get_current().target_max_block_size >= 2 * BLOCK_BYTES
    _, blocks = client_at_first_pass(1_437, row_bytes, batch_size=8).blocks()
    assert sum(ids.size for ids, _ in blocks) >= 1_437 * 0.6
    # A block holds whole steps, at least one, and is otherwise far below the size that Ray splits.
    assert all(ids.size % 4 == 0 and ids.size * row_bytes <= max(BLOCK_BYTES, 4 * row_bytes) for ids, _ in blocks)


def test_trap_the_controller_polls_every_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S")
    start_ray()  # Ray is running already, as under `ray job submit`
    assert float(os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]) <= 0.2
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    start_ray()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.5", "the user's own setting is kept"


def rank_rows(ids: list[int]) -> Iterator[RankRows]:
    return iter([(np.array(ids), np.ones(len(ids), np.float32), np.ones(len(ids), dtype=bool))])


@pytest.mark.parametrize(
    ("streamed", "planned", "message"),
    [
        (8, [0, 1, 2, 3, 4, 5, 7, 6], r"from row 2 of a batch on, ids \[6, 7\]… came instead of \[7, 6\]…"),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], r"the stream ended before id 4"),
        (12, [0, 1, 2, 3, 4, 5, 6, 7], "more rows than the plan"),
    ],
)
def test_rows_that_differ_from_the_plan_are_detected(streamed: int, planned: list[int], message: str) -> None:
    shard = ray.data.range(streamed, override_num_blocks=1).iterator()
    with pytest.raises(PlanMismatch, match=f"epoch 2, train: .*{message}"):
        list(RayStream(shard).batches(pass_of(2, "train", 1), rank_rows(planned), 4))


def test_an_actor_killed_during_a_checkpoint_write_recovers_from_that_checkpoint(tmp_path: Path) -> None:
    with score_actor(replace(spec_of(64, 8), run_folder=str(tmp_path))) as scores:
        first = scores.announce(pass_of(0, "train", 1)).hash
        state = close_epoch(scores, AttemptKey(1, 0), 0)
        second = scores.announce(pass_of(1, "train", 1)).hash
        ray.kill(scores.channel.handle, no_restart=False)
        while scores.generation():  # the killed actor may still answer
            time.sleep(0.02)
        (tmp_path / "checkpoints").mkdir()
        parts = {"model": {}, "trainer": {}, "selector": state, "position": {}}
        late = threading.Timer(3.0, write_checkpoint, (tmp_path, 1), parts)
        late.start()
        assert scores.announce(pass_of(1, "train", 1)).hash == second != first
        assert not late.is_alive(), "the actor answered without its checkpoint"


def test_trap_an_iterator_without_prefetching_leaks_a_thread() -> None:
    def prefetchers() -> int:
        return sum(thread.name == "Prefetcher" for thread in threading.enumerate())

    before = prefetchers()
    with score_actor(spec_of(97, 6)) as scores:
        (shard,) = shards = plan_dataset(scores, sources_of(97)).streaming_split(1, equal=True)
        for epoch in range(EPOCHS):
            stream_ranks(scores, shards, epoch, "train")
            close_epoch(scores, AttemptKey(1, epoch), 0)
        deadline = time.monotonic() + 5
        while prefetchers() > before:  # each thread ends a moment after its pass
            assert time.monotonic() < deadline, "RayStream leaks threads"
            time.sleep(0.05)
        scores.announce(pass_of(0, "train", 1, generation=2))
        assert sum(1 for _ in shard.iter_batches(batch_size=None, prefetch_batches=0)) > 0
        time.sleep(0.5)
        assert prefetchers() > before, "Ray has fixed the leak: RayStream may stop prefetching"
