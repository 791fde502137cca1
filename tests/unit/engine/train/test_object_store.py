"""Runs whose folder is on an S3 server that fails: equal to local runs, killed and continued, and read by commands."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import yaml
from click.testing import CliRunner

from rayprune.cli.main import cli
from rayprune.config import Config
from rayprune.engine.storage import lock
from rayprune.engine.storage.checkpoint import checkpoint_path, newest_checkpoint, newest_position
from rayprune.engine.storage.run_folder import read_metrics, read_selection
from rayprune.engine.train.driver import RunResult, Start, train
from rayprune.errors import ConfigError, RunFolderError, TrainingPaused
from rayprune.paths import as_path, remove_tree
from tests.support.command_line import environment
from tests.support.object_store import BUCKET, ObjectStore, object_store
from tests.support.runs import assert_same_run, run_config
from tests.unit.engine.user_loop.loops import local_shard

EPOCHS = 4


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture(autouse=True)
def quick_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SETTLE_S", 0.1)


def config_in(folder: str | Path, name: str = "run", **sections: Any) -> Config:
    return run_config(folder, name, run={"checkpoint_steps": 3}, **sections)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(config_in(tmp_path_factory.mktemp("local")))


@pytest.fixture(scope="module")
def finished(store: ObjectStore) -> RunResult:
    """The same run on a server that fails now and then, and is slow."""
    with pytest.MonkeyPatch.context() as patch, store.failing(share=0.1, slow_s=0.01) as faults:
        patch.setattr(lock, "_SETTLE_S", 0.1)
        result = train(config_in(BUCKET))
    assert faults.num_failed > 20
    return result


def test_a_run_on_a_store_that_fails_equals_a_local_one(finished: RunResult, local: RunResult) -> None:
    assert str(finished.folder) == f"{BUCKET}/run"
    assert_same_run(finished, local)
    for epoch in range(EPOCHS):
        ours, theirs = read_selection(finished.folder, epoch), read_selection(local.folder, epoch)
        assert np.array_equal(ours.ids, theirs.ids)
        assert np.array_equal(ours.weights, theirs.weights)


def test_its_folder_has_the_same_files(finished: RunResult, local: RunResult) -> None:
    def files(folder: Path) -> set[str]:
        found = set()
        for path in folder.iterdir():
            found |= {f"{path.name}/{name}" for name in files(path)} if path.is_dir() else {path.name}
        return {name.split(".tfevents.")[0] for name in found}

    assert files(finished.folder) - files(local.folder) == {"checkpoints/written.json"}
    assert files(local.folder) - files(finished.folder) == {".lock"}


def test_the_same_command_finds_it_finished_and_another_run_is_refused(finished: RunResult, local: RunResult) -> None:
    again = train(config_in(BUCKET))
    assert again.metrics == finished.metrics
    with pytest.raises(RunFolderError, match=f"{BUCKET}/run holds another run"):
        train(config_in(BUCKET, optim={"lr": 0.5}))


def test_a_killed_run_continues_to_the_same_result(store: ObjectStore, local: RunResult, tmp_path: Path) -> None:
    file = tmp_path / "it.yaml"
    config = run_config(BUCKET, "killed", run={"checkpoint_steps": 5})  # type: ignore[arg-type]
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    folder = as_path(BUCKET) / "killed"
    command = [sys.executable, "-u", "-m", "rayprune", "train", str(file)]
    with store.failing(share=0.02, slow_s=0.01, lag_s=0.5) as faults:
        running = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        next(line for line in running.stdout if f"2/{EPOCHS}  " in line)
        running.send_signal(signal.SIGKILL)
        running.communicate()
    assert faults.num_stale > 0
    assert (folder / lock.LOCK).exists(), "nobody could give the lease back"
    assert (2, 0) <= newest_position(folder) < (EPOCHS, 0)
    assert_same_run(train(config), local)
    assert not (folder / lock.LOCK).exists()


def test_a_run_outside_the_main_thread_that_loses_its_lease_saves_and_ends(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_LEASE_S", 0.3)

    def lose_lease(start: Start) -> None:
        (start.folder / lock.LOCK).write_text(json.dumps({"owner": "other", "host": "far"}))

    config = config_in(BUCKET, "lost", train={"epochs": 200})
    with ThreadPoolExecutor(1) as pool, pytest.raises(TrainingPaused, match="saved before step"):
        pool.submit(train, config, on_start=lose_lease).result()


def test_a_checkpoint_that_a_listing_lacks_is_found(finished: RunResult, store: ObjectStore) -> None:
    with store.failing(lag_s=3600.0):
        assert list((finished.folder / "checkpoints").glob("epoch-*")), "the listing is made before the checkpoint"
        newest = checkpoint_path(finished.folder, EPOCHS + 1)
        for file in checkpoint_path(finished.folder, EPOCHS).iterdir():
            if file.name != "position.json":
                (newest / file.name).write_bytes(file.read_bytes())
        assert newest not in list((finished.folder / "checkpoints").glob("epoch-*"))
        (finished.folder / "checkpoints" / "written.json").write_text(f'["{newest.name}", "epoch-{EPOCHS:06d}", 3]')
        assert newest_checkpoint(finished.folder) == checkpoint_path(finished.folder, EPOCHS), "the new one is damaged"
    remove_tree(newest)


def test_a_scoring_run_and_its_subset_equal_local_ones(store: ObjectStore, tmp_path: Path) -> None:
    chosen = {
        "method": {"name": "tdds", "prune_ratio": 0.5, "trajectory_len": 4, "window_size": 3},
        "train": {"epochs": 2},
        "collect": {"train": {"epochs": 4}},
    }
    assert_same_run(train(config_in(BUCKET, "tdds", **chosen)), train(config_in(tmp_path, "tdds", **chosen)))
    assert read_metrics(as_path(BUCKET) / "tdds" / "collect")


def test_a_run_continues_from_one_on_another_storage(finished: RunResult, local: RunResult, tmp_path: Path) -> None:
    config = config_in(tmp_path, "adopted")
    named = config.run.model_copy(update={"resume": f"{BUCKET}/run/checkpoints/epoch-{EPOCHS - 1:06d}"})
    result = train(config.model_copy(update={"run": named}))
    assert result.metrics[-1]["plan_hash"] == local.metrics[-1]["plan_hash"]


def test_report_show_and_select_read_and_write_it(finished: RunResult, tmp_path: Path) -> None:
    def output(*words: str) -> str:
        done = CliRunner().invoke(cli, list(words), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    folder = str(finished.folder)
    assert f"report: {folder}/report.html" in output("report", folder)
    assert "<html" in (finished.folder / "report.html").read_text(encoding="utf-8")
    page = tmp_path / "page.html"
    output("report", BUCKET, "--output", str(page))
    assert "finished" in output("show", folder, "--top", "3")
    assert f"{folder}/chosen.parquet" in output("select", folder, "--keep", "0.5", "--force")
    chosen = {"method": {"name": "fixed", "path": f"{folder}/chosen.parquet"}, "train": {"epochs": 1}}
    assert train(config_in(tmp_path, "subset", **chosen)).metrics[-1]["kept"] == 151
    output("report", folder, "--png", str(tmp_path / "pngs"))
    assert list((tmp_path / "pngs").glob("*.png"))


@pytest.mark.parametrize("kind", ["URI", "RunConfig", "storage_filesystem"])
def test_a_loop_of_ones_own_writes_its_run_there(store: ObjectStore, kind: str) -> None:
    folder = f"{BUCKET}/{kind}/loop"
    filesystem = as_path(BUCKET).filesystem if kind == "storage_filesystem" else None  # type: ignore[attr-defined]
    parent = f"bucket/{kind}" if filesystem else f"{BUCKET}/{kind}"
    configured = ray.train.RunConfig(name="loop", storage_path=parent, storage_filesystem=filesystem)
    shard = local_shard(num_epochs=2, run=folder if kind == "URI" else configured)
    for epoch in shard:
        for batch in epoch:
            epoch.weigh(batch, batch["x"].square().sum(1))
        epoch.log(val_accuracy=0.5)
    assert [line["epoch"] for line in read_metrics(as_path(folder))] == [0, 1]
    assert (as_path(folder) / "scores.parquet").exists()


def test_trackers_that_need_local_files_are_refused(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = run_config(BUCKET, "tracked", run={"trackers": ["mlflow"]})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI, or use a local folder"):
        train(config)


def test_credentials_in_the_storage_path_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give them to the file system by the environment"):
        config_in("s3://key:word@bucket/runs")


def test_a_bucket_that_is_missing_is_one_line(store: ObjectStore) -> None:
    with pytest.raises(RunFolderError, match=r"s3://nobody/runs/run can't be written .*: set run\.storage_path"):
        train(config_in("s3://nobody/runs"))
