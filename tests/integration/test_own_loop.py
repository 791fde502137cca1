"""User-written Ray Train loops on pruned data: transports, failures, any ray.data.Dataset, FSDP2."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import rayprune
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.user_loop.api import PrunedData
from rayprune.sources.tables.audits import read_audit
from rayprune.sources.tables.scores import read_scores
from tests.support import own_loops
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module", autouse=True)
def loops_by_value() -> None:
    """Pickle the loops by value: workers cannot import the tests."""
    ray.cloudpickle.register_pickle_by_value(own_loops)


def prune(source: Any = own_loops.DATA, **changes: Any) -> PrunedData:
    settings = {"method": own_loops.METHOD, "num_epochs": own_loops.EPOCHS, "batch_size": own_loops.BATCH}
    return rayprune.prune(source, **{**settings, **changes})


def fit(data: Any, folder: Path, workers: int, failures: int = 0, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    resources = {"resources_per_worker": {"CPU": 0.5}} if workers else {}
    TorchTrainer(
        own_loops.train_loop,
        train_loop_config={"folder": str(folder), **config},
        datasets={"train": data},
        scaling_config=ScalingConfig(num_workers=workers, **resources),
        run_config=RunConfig(
            name="loop",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


def batches_by_step(folder: Path, ranks: int) -> dict[tuple[int, int], list[Any]]:
    """Return (epoch, step) → [plan hash, ids, weights] of each rank; a repeated step counts the last time."""
    batches: dict[tuple[int, int], list[Any]] = {}
    for rank in range(ranks):
        for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines():
            epoch, step, _, plan_hash, ids, weights = json.loads(line)
            batches.setdefault((epoch, step), [None] * ranks)[rank] = [plan_hash, ids, weights]
    return dict(sorted(batches.items()))


def global_batches(folder: Path, ranks: int) -> list[tuple[Any, ...]]:
    """Return (position, plan hash, ids, weights) of each step over all ranks."""
    return [
        (position, parts[0][0], *(list(itertools.chain(*column)) for column in list(zip(*parts, strict=True))[1:]))
        for position, parts in batches_by_step(folder, ranks).items()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loop in Ray Train's local mode."""
    folder = tmp_path_factory.mktemp("alone")
    data = prune()
    fit(data, folder, 0)
    data.close()
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """Two workers that read through Ray Data and a map of the user."""
    folder = tmp_path_factory.mktemp("together")
    data = prune(run=folder / "run", world_size=2, audit=True)
    mapped = data.dataset.map_batches(lambda batch: {**batch, "x": batch["x"] * 1}, batch_size=None)
    fit(mapped, folder, 2, audit=True)
    np.save(folder / "audit.npy", data.audit().p_wrong)
    yield folder, data.scores()
    data.close()


def test_batches_do_not_depend_on_workers(alone: Path, together: tuple[Path, dict[str, np.ndarray]]) -> None:
    two_ranks, one_rank = global_batches(together[0], 2), global_batches(alone, 1)
    # Later plans depend on losses that one rank and two round differently.
    first = [batch for batch in two_ranks if batch[0][0] < 2]
    assert first == one_rank[: len(first)]
    loader = rayprune.local_loader(own_loops.DATA, own_loops.METHOD, own_loops.EPOCHS, own_loops.BATCH)
    epoch = next(loader.epochs())
    assert [batch["id"].tolist() for batch in epoch.iter_torch_batches()] == [
        batch[2] for batch in one_rank if batch[0][0] == 0
    ]
    assert epoch.plan_hash == one_rank[0][1]


def test_two_workers_and_the_driver_audit_the_same_visits(together: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, scores = together
    stored = read_audit(folder / "run").table
    for name in ("audit-0", "audit-1", "audit"):
        np.testing.assert_array_equal(np.load(folder / f"{name}.npy"), stored.p_wrong)
    assert stored.label.tolist() == own_loops.DATA["label"].tolist()
    assert "outlier" in stored.statistics, "only the driver reads the rows"
    assert np.corrcoef(stored.statistics["loss"], scores["loss"])[0, 1] > 0.5


class Items:
    """The data as a map-style Dataset, large enough for Ray's object store."""

    def __len__(self) -> int:
        return own_loops.N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": own_loops.X[index], "label": own_loops.DATA["label"][index], "extra": np.zeros(500)}


def test_reading_in_processes_gives_the_same_batches(alone: Path, tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    data = prune(Items(), stream="local", num_workers=2)
    fit(data, tmp_path, 0)
    assert batches_by_step(tmp_path, 1) == batches_by_step(alone, 1)
    data.close()


def test_two_workers_write_one_run_folder(together: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, scores = together
    lines = read_metrics(folder / "run")
    assert [line["epoch"] for line in lines] == list(range(own_loops.EPOCHS))
    assert {line["world_size"] for line in lines} == {2}
    real = [(at, sum(w > 0 for _, _, ws in parts for w in ws)) for (at, _), parts in batches_by_step(folder, 2).items()]
    trained = [sum(rows for at, rows in real if at <= line["epoch"]) for line in lines]
    assert [line["samples_trained"] for line in lines] == trained
    assert np.array_equal(read_scores(folder / "run").scores["loss"], scores["loss"], equal_nan=True)


@pytest.mark.scenario
def test_a_killed_worker_and_a_killed_score_actor_restart_the_loop_from_its_own_checkpoint(
    tmp_path: Path, together: tuple[Path, dict[str, np.ndarray]]
) -> None:
    """Rank 1 dies in the middle of epoch 1, the actor in epoch 2. The workers read the rows themselves."""
    data = prune(stream="local")
    log, killed = tmp_path / "rank-0.jsonl", threading.Event()

    def kill_actor() -> None:
        while not log.exists() or "\n[2, " not in log.read_text():
            time.sleep(0.05)
        ray.kill(ray.get_actor(data._scores.name), no_restart=False)
        killed.set()

    threading.Thread(target=kill_actor, daemon=True).start()
    fit(data, tmp_path, 2, failures=3, every=5, die=(1, 8), pause_s=0.02)
    assert (tmp_path / "died").exists()
    assert killed.is_set()
    whole, scores = together
    assert batches_by_step(tmp_path, 2) == batches_by_step(whole, 2)
    weights, whole_weights = (torch.load(folder / "final.pt", weights_only=True) for folder in (tmp_path, whole))
    assert all(torch.equal(weights[name], whole_weights[name]) for name in whole_weights)
    killed_scores = data.scores()
    assert all(np.array_equal(killed_scores[name], scores[name], equal_nan=True) for name in killed_scores)
    data.close()


@pytest.mark.scenario
def test_fsdp2_shards_the_parameters_and_keeps_the_first_plan(
    tmp_path: Path, together: tuple[Path, dict[str, np.ndarray]]
) -> None:
    data = prune(stream="device", num_epochs=2)
    fit(data, tmp_path, 2, fsdp=True)
    first, expected = ([b for b in global_batches(folder, 2) if b[0][0] == 0] for folder in (tmp_path, together[0]))
    assert first == expected
    assert torch.load(tmp_path / "final.pt", weights_only=True)["0.weight"].shape == (8, 5)
    data.close()


def rows() -> list[dict[str, Any]]:
    order = np.random.default_rng(5).permutation(own_loops.N)
    return [{"id": int(i), "x": own_loops.X[i], "label": int(own_loops.DATA["label"][i])} for i in order]


def test_any_dataset_with_an_id_column_is_filtered(tmp_path: Path) -> None:
    data = prune(ray.data.from_items(rows(), override_num_blocks=5))
    assert "resume is at epoch ends" in repr(data)
    fit(data.dataset.map_batches(lambda batch: batch), tmp_path, 2)
    by_epoch: dict[int, dict[int, float]] = {epoch: {} for epoch in range(own_loops.EPOCHS)}
    for (epoch, _), ranks in batches_by_step(tmp_path, 2).items():
        for _, ids, weights in filter(None, ranks):
            assert not by_epoch[epoch].keys() & set(ids), "an id occurs twice in an epoch"
            by_epoch[epoch] |= dict(zip(ids, weights, strict=True))
    assert len(by_epoch[0]) == own_loops.N - 1  # two ranks get the same number
    assert all(weight == 1.0 for weight in by_epoch[0].values())
    for epoch in range(1, own_loops.EPOCHS):
        assert len(by_epoch[epoch]) < 0.9 * own_loops.N
        assert set(by_epoch[epoch].values()) == {1.0, 2.0}
    assert 0 < (data.scores()["times_pruned"] > 0).mean() < 1
    data.close()


def fit_tokens(data: PrunedData, dataset: Any, folder: Path, workers: int) -> list[set[int]]:
    """Train on token ids; return the ids of each epoch whose rows were those of the data."""
    TorchTrainer(
        own_loops.token_loop,
        train_loop_config={"folder": str(folder)},
        datasets={"train": dataset},
        scaling_config=ScalingConfig(
            num_workers=workers, **({"resources_per_worker": {"CPU": 0.5}} if workers else {})
        ),
        run_config=RunConfig(name="loop", storage_path=str(folder)),
    ).fit()
    lines = [json.loads(line) for file in folder.glob("tokens-*.jsonl") for line in file.read_text().splitlines()]
    for _, row, tokens, text in lines:
        assert (tokens, text) == (own_loops.TOKENS[row], own_loops.TEXTS[row])
    data.close()
    return [{row for index, row, _, _ in lines if index == epoch} for epoch in range(3)]


def test_a_tokenized_dataset_keeps_its_ragged_columns_and_text(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {"input_ids": datasets.Sequence(datasets.Value("int32")), "text": datasets.Value("string")}
    columns = {"input_ids": own_loops.TOKENS, "text": own_loops.TEXTS}
    source = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    data = prune(source, num_epochs=3)
    mapped = data.dataset.map_batches(lambda batch: {**batch, "more": batch["id"] + 1}, batch_size=None)
    kept = fit_tokens(data, mapped, tmp_path, workers=0)
    assert kept[0] == set(range(203))
    assert all(0 < len(ids) < 180 for ids in kept[1:])


def test_a_dataset_without_ids_is_numbered_in_its_order(tmp_path: Path) -> None:
    columns = {"input_ids": pa.array(own_loops.TOKENS, pa.list_(pa.int32())), "text": own_loops.TEXTS}
    whole = pa.table(columns)
    for start, stop in ((0, 7), (7, 120), (120, 121), (121, 203)):
        pq.write_table(whole.slice(start, stop - start), tmp_path / f"part-{start:03}.parquet", row_group_size=30)
    plain = ray.data.read_parquet(str(tmp_path)).map_batches(lambda batch: batch, batch_size=16)
    with pytest.raises(ValueError, match=r"no column 'id' .*, or number its rows with rayprune\.with_ids\(ds\)"):
        prune(plain)
    numbered = rayprune.with_ids(plain)
    read = numbered.take_all()
    assert [row["id"] for row in read] == list(range(203))
    assert [row["text"] for row in read] == own_loops.TEXTS
    with pytest.raises(ValueError, match="has a column 'id' already: give with_ids another id_column"):
        rayprune.with_ids(numbered)
    data = prune(numbered, num_epochs=3)
    kept = fit_tokens(data, data.dataset, tmp_path, workers=2)
    assert len(kept[0]) == 202  # two ranks get the same number
    assert all(0 < len(ids) < 180 for ids in kept[1:])


def test_two_prunes_of_one_dataset_are_independent(tmp_path: Path) -> None:
    """Each pruned dataset belongs to its own actor, and the original to none."""
    whole = ray.data.from_items(rows(), override_num_blocks=5)
    first = prune(whole, method=rayprune.Random(prune_ratio=0.5), num_epochs=2)
    second = prune(whole, method=rayprune.Full(), num_epochs=2)
    fit(first.dataset, tmp_path / "first", 0)
    fit(second.dataset, tmp_path / "second", 0)
    for folder, expected in (("first", 351), ("second", 701)):
        trained = sum(
            len(ranks[0][1]) for (epoch, _), ranks in batches_by_step(tmp_path / folder, 1).items() if epoch == 1
        )
        assert trained == expected
    with pytest.raises(Exception, match="was not made by rayprune"):
        fit(whole, tmp_path / "plain", 0)
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: {**row, "weight": 1.0}, "a name that rayprune adds itself"),
        (lambda row: {**row, "id": min(row["id"], 699)}, r"once: repeated \[699\], missing \[700\]"),
        (lambda row: {"x": row["x"]}, "no column 'id'"),
    ],
)
def test_ids_that_do_not_number_the_rows_are_refused(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prune(ray.data.from_items([change(row) for row in rows()]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.drop_columns(["id"]), "lost their column 'id'"),
        (lambda data: data.filter(lambda row: row["id"] % 2 == 0), r"ids \[.*\]… came instead of \["),
        (lambda data: data.random_shuffle(), "must keep its rows and their order"),
    ],
)
def test_maps_that_lose_rows_order_or_ids_are_refused(change: Any, words: str, tmp_path: Path) -> None:
    data = prune()
    with pytest.raises(Exception, match=words):
        fit(change(data.dataset), tmp_path, 0)
    data.close()


def iterate_as_without_rayprune() -> None:
    for _ in ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=8):
        pass


@pytest.mark.parametrize("source", ["arrays", "local", "dataset"])
def test_a_loop_that_kept_rays_own_shard_is_told_so(source: str, tmp_path: Path) -> None:
    """Otherwise it would train on everything, or on nothing."""
    data = (
        prune(ray.data.from_items(rows()))
        if source == "dataset"
        else prune(stream="ray" if source == "arrays" else source)
    )
    settings = RunConfig(name="loop", storage_path=str(tmp_path))
    trainer = TorchTrainer(
        iterate_as_without_rayprune,
        datasets={"train": data},
        scaling_config=ScalingConfig(num_workers=0),
        run_config=settings,
    )
    with pytest.raises(Exception, match=r"replace ray\.train\.get_dataset_shard by rayprune\.get_dataset_shard"):
        trainer.fit()
    data.close()


@pytest.mark.parametrize("is_numbered", [False, True])
def test_a_data_config_that_does_not_keep_the_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, is_numbered: bool
) -> None:
    """The trainer applies its DataConfig as here, but in an actor."""
    data = prune(rayprune.with_ids(ray.data.from_items([{"x": 1.0}] * 64)) if is_numbered else own_loops.DATA)
    careless = DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=False))
    (shards,) = careless.configure({"train": data.dataset}, 1, None, None)
    monkeypatch.setattr(ray.train, "get_dataset_shard", shards.get)
    with pytest.raises(ValueError, match="does not keep the order of rows"):
        rayprune.get_dataset_shard("train")
    data.close()


def test_a_dataset_not_made_by_prune_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="was not made by rayprune"):
        fit(ray.data.range(10), tmp_path, 0)


@pytest.mark.parametrize("name", ["pruned", pytest.param("plain", marks=pytest.mark.scenario)])
def test_the_example_runs(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"{name}_loop.py"
    program = (EXAMPLES / file.name).read_text()
    assert "EPOCHS, BATCH, WORKERS = 10, " in program
    file.write_text(program.replace("EPOCHS, BATCH, WORKERS = 10, ", "EPOCHS, BATCH, WORKERS = 4, "))
    environment = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray's default of 2 s would delay the end of each run
    }
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Ray may log a line of a worker twice.
    counts = {int(count) for count in re.findall(r"epoch 3: loss [\d.]+, (\d+) samples trained", done.stdout)}
    assert len(counts) == 1
    assert (counts == {4 * 1797}) == (name == "plain")
    assert min(counts) < 0.95 * 4 * 1797 or name == "plain"


def test_the_diff_in_the_readme_is_that_of_the_examples() -> None:
    plain, pruned = ((EXAMPLES / f"{name}_loop.py").read_text().splitlines() for name in ("plain", "pruned"))
    real = {line[0] + line[2:] for line in difflib.ndiff(plain, pruned) if line[:2] in {"- ", "+ "}}
    block = re.search(r"```diff\n(.*?)```", (EXAMPLES.parent / "README.md").read_text(), re.DOTALL)
    assert block is not None
    shown = {line for line in block[1].splitlines() if line[:1] in {"-", "+"}}
    assert len(shown) > 6
    assert shown <= real
