"""A run that is stopped and resumed gives the same result as an undisturbed one; a folder takes one run only."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import SCHEMA, checkpoint_path, newest_checkpoint
from rayprune.engine.storage.resume import _is_newer, finished_unread
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import RunResult, train
from tests.support.runs import assert_same_run, run_config, user

EPOCHS = 6
SECTIONS: dict[str, dict[str, Any]] = {"train": {"epochs": EPOCHS, "batch_size": 32}, "data": {"limit": 200}}
# Trains the config in argv[1] (YAML).
SCRIPT = """
import sys, yaml
from rayprune.config import make_config
from rayprune.engine.train.driver import train
if __name__ == "__main__":
    train(make_config(yaml.safe_load(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run that every resumed one must equal."""
    return train(run_config(tmp_path_factory.mktemp("undisturbed"), **SECTIONS))


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Config, RunResult]:
    """A finished run that the test may damage."""
    config = run_config(tmp_path, **SECTIONS)
    return config, train(config)


def wait_for_lines(file: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run wrote no lines"
        time.sleep(0.005)


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    slow = {"name": user("faulty"), "pause_s": 0.02}
    config = run_config(tmp_path, **SECTIONS, model=slow)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, config.to_yaml()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(read_metrics(tmp_path / "run"))
    assert 3 <= done < EPOCHS
    resumed = train(config)
    assert_same_run(resumed, train(run_config(tmp_path, "undisturbed", **SECTIONS, model=slow)))
    assert [line["epoch"] for line in resumed.metrics] == list(range(EPOCHS))


def test_a_finished_run_is_left_alone(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    lines = (result.folder / "metrics.jsonl").read_bytes()
    newest = newest_checkpoint(result.folder)
    assert newest is not None
    written = (newest / "model.pt").stat().st_mtime_ns
    starts: list[int] = []
    again = train(config, on_start=lambda start: starts.append(start.first_epoch))
    assert starts == []
    assert again.metrics == result.metrics
    assert (result.folder / "metrics.jsonl").read_bytes() == lines
    assert (newest / "model.pt").stat().st_mtime_ns == written


def test_a_finished_run_is_recognized_without_its_data(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    assert finished_unread(config) == result.folder
    never = config.model_copy(update={"run": config.run.model_copy(update={"resume": "never"})})
    elsewhere = config.data.model_copy(update={"limit": 199})
    longer = config.train.model_copy(update={"epochs": EPOCHS + 1})
    for other in (never, config.model_copy(update={"data": elsewhere}), config.model_copy(update={"train": longer})):
        assert finished_unread(other) is None
    assert not _is_newer("s3://bucket/data", result.folder / "scores.parquet")
    older = result.folder.parent / "data"
    older.mkdir()
    os.utime(older, (0, 0))
    assert not _is_newer(str(older), result.folder / "scores.parquet")
    (older / "new.npy").touch()
    assert _is_newer(str(older), result.folder / "scores.parquet"), "the data were changed in place"
    (older / "new.npy").unlink()
    (older / "train" / "cat").mkdir(parents=True)
    for folder in (older / "train" / "cat", older / "train", older):
        os.utime(folder, (0, 0))
    assert not _is_newer(str(older), result.folder / "scores.parquet")
    (older / "train" / "cat" / "moved.png").touch()
    assert _is_newer(str(older), result.folder / "scores.parquet")
    relabeled = config.data.model_copy(update={"relabel": "audit.parquet"})
    assert finished_unread(config.model_copy(update={"data": relabeled})) is None
    lines = (result.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (result.folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert finished_unread(config) is None, "the last line is missing"
    (result.folder / "metrics.jsonl").write_text("".join(lines))
    damage_newest(result.folder)
    assert finished_unread(config) is None, "the last epoch must be trained again"


def test_only_new_epochs_are_delivered_after_a_resume(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    damage_newest(result.folder)
    epochs: list[int] = []
    train(config, on_epoch=lambda line: epochs.append(line["epoch"]))
    assert epochs == [EPOCHS - 1]


def damage_newest(folder: Path) -> None:
    flip_a_byte(checkpoint_path(folder, EPOCHS) / "model.pt")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model.pt was altered": lambda folder: flip_a_byte(folder / "model.pt"),
    "selector.npz is missing": lambda folder: (folder / "selector.npz").unlink(),
    "it is incomplete": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json: ": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped(
    finished: tuple[Config, RunResult], undisturbed: RunResult, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config, result = finished
    newest = checkpoint_path(result.folder, EPOCHS)
    DAMAGES[damage](newest)
    starts: list[int] = []
    again = train(config, on_start=lambda start: starts.append(start.first_epoch))
    assert starts == [EPOCHS - 1]
    warning = next(record.getMessage() for record in caplog.records if "can't be used" in record.getMessage())
    assert str(newest) in warning
    assert damage in warning
    assert_same_run(again, undisturbed)


@pytest.mark.parametrize("files", range(4))
def test_a_half_written_checkpoint_is_ignored(
    files: int, finished: tuple[Config, RunResult], undisturbed: RunResult
) -> None:
    """Files are written one by one under their final names, the manifest last, so a kill leaves the first few."""
    config, result = finished
    newest = checkpoint_path(result.folder, EPOCHS)
    for name in ["manifest.json", "position.json", "selector.npz", "trainer.pt"][: files + 1]:
        (newest / name).unlink()
    assert_same_run(train(config), undisturbed)


def test_a_checkpoint_of_a_newer_version_is_refused_and_kept(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    newest = checkpoint_path(result.folder, EPOCHS)
    position = json.loads((newest / "position.json").read_text())
    (newest / "position.json").write_text(json.dumps({**position, "schema": SCHEMA + 1}))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["position.json"] = hashlib.sha256((newest / "position.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    before = {file: file.read_bytes() for file in newest.iterdir()}
    with pytest.raises(ValueError, match=rf"{newest} has schema {SCHEMA + 1}, this version reads {SCHEMA}: upgrade"):
        train(config)
    assert {file: file.read_bytes() for file in newest.iterdir()} == before


def test_random_layers_draw_the_same_numbers_after_a_resume(tmp_path: Path) -> None:
    noisy = {"name": user("noisy")}
    config = run_config(tmp_path, **SECTIONS, model=noisy)
    damage_newest(train(config).folder)
    assert_same_run(train(config), train(run_config(tmp_path, "undisturbed", **SECTIONS, model=noisy)))


@pytest.mark.parametrize("done", [EPOCHS - 1, EPOCHS])
def test_a_kill_before_the_metrics_line_loses_no_line(
    finished: tuple[Config, RunResult], undisturbed: RunResult, done: int
) -> None:
    config, result = finished
    if done < EPOCHS:
        damage_newest(result.folder)
    file = result.folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: done - 1]))
    again = train(config)
    assert_same_run(again, undisturbed)
    assert again.metrics[done - 1]["seconds"].keys() == undisturbed.metrics[done - 1]["seconds"].keys()


def test_an_incomplete_line_is_removed(finished: tuple[Config, RunResult], undisturbed: RunResult) -> None:
    config, result = finished
    damage_newest(result.folder)
    file = result.folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    assert len(read_metrics(result.folder)) == EPOCHS - 1
    assert_same_run(train(config), undisturbed)
    assert [json.loads(line)["epoch"] for line in file.read_text().splitlines()] == list(range(EPOCHS))


def test_another_config_is_refused_and_named(finished: tuple[Config, RunResult]) -> None:
    _, result = finished
    before = (result.folder / "config.yaml").read_text()
    other = run_config(result.folder.parent, train={**SECTIONS["train"], "seed": 7}, data={"limit": 150})
    with pytest.raises(ValueError, match=r"another run \(data\.limit 200 → 150; train\.seed 0 → 7\)"):
        train(other)
    assert (result.folder / "config.yaml").read_text() == before


def test_resume_never_refuses_a_folder_that_holds_a_run(finished: tuple[Config, RunResult]) -> None:
    _, result = finished
    with pytest.raises(ValueError, match="holds a run already"):
        train(run_config(result.folder.parent, **SECTIONS, run={"resume": "never"}))
    fresh = run_config(result.folder.parent, "fresh", **SECTIONS, run={"resume": "never"})
    assert len(train(fresh).metrics) == EPOCHS


def test_a_folder_without_its_config_is_recognized_by_its_checkpoints(finished: tuple[Config, RunResult]) -> None:
    _, result = finished
    (result.folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds another run \(epoch-000006 is of config"):
        train(run_config(result.folder.parent, **SECTIONS, optim={"lr": 0.001}))
    assert not (result.folder / "config.yaml").exists()


def test_other_data_with_the_same_config_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    labels = rng.integers(0, 3, 90)
    np.save(data / "x_train.npy", rng.random((90, 5), dtype=np.float32))
    np.save(data / "y_train.npy", labels)
    sections = {"data": {"source": "arrays", "path": str(data)}, "train": {"epochs": 2, "batch_size": 16}}
    config = run_config(tmp_path, **sections)
    result = train(config)
    environment = (result.folder / "environment.json").read_text()
    labels[4] = (labels[4] + 1) % 3
    np.save(data / "y_train.npy", labels)
    with pytest.raises(ValueError, match=r"was trained on other data .*: choose another run\.name"):
        train(config)
    assert (result.folder / "environment.json").read_text() == environment, "a refused run leaves the folder as it was"
    elsewhere = run_config(tmp_path, "elsewhere", **sections, run={"resume": str(result.folder)})
    with pytest.raises(ValueError, match=r"was trained on other data .*: choose another run\.resume"):
        train(elsewhere)
    assert not (tmp_path / "elsewhere").exists()


def test_other_resources_are_the_same_run(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    moved = config.model_copy(update={"scaling": config.scaling.model_copy(update={"stream": "local"})})
    assert train(moved).metrics == result.metrics


def test_a_damaged_checkpoint_of_run_resume_is_refused(tmp_path: Path, finished: tuple[Config, RunResult]) -> None:
    _, result = finished
    damage_newest(result.folder)
    path = str(checkpoint_path(result.folder, EPOCHS))
    with pytest.raises(ValueError, match=r"epoch-000006 is damaged \(model\.pt was altered\): name a run folder"):
        train(run_config(tmp_path, "other", **SECTIONS, run={"resume": path}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", "garbage", r"config\.yaml can't be read"),
        ("config.yaml", "a: [1", r"config\.yaml can't be read"),
        ("metrics.jsonl", "garbage\n", r"metrics\.jsonl, line 1 is not valid JSON"),
    ],
)
def test_a_damaged_file_of_the_run_folder_is_named(
    name: str, content: str, words: str, finished: tuple[Config, RunResult]
) -> None:
    config, result = finished
    (result.folder / name).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"can't be written \(.*checkpoints: File exists\)"):
        train(run_config(tmp_path))


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"can't be written \(.*metrics\.jsonl: Is a directory\)"):
        train(run_config(tmp_path))


LOCK = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_only_one_process_at_a_time_trains_in_a_folder(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    damage_newest(result.folder)
    command = [sys.executable, "-c", LOCK, str(result.folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="another process is training"):
            train(config)
        other.communicate()
    assert len(train(config).metrics) == EPOCHS
