"""A run that is stopped anywhere and started again ends as if nothing had happened; a folder takes one run only."""

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
import torch

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import SCHEMA, checkpoint_path, newest_checkpoint, write_checkpoint
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import RunResult, train
from tests.support.runs import assert_same_run, run_config, user

EPOCHS = 6
SECTIONS: dict[str, dict[str, Any]] = {"train": {"epochs": EPOCHS, "batch_size": 32}, "data": {"limit": 200}}
# Trains the config in argv[1] (YAML), slowly enough to be killed between two given lines.
SCRIPT = """
import sys, yaml
from rayprune.config import make_config
from rayprune.engine.train.driver import train
if __name__ == "__main__":
    train(make_config(yaml.safe_load(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The run that every resumed one must equal."""
    return train(run_config(tmp_path_factory.mktemp("undisturbed"), **SECTIONS))


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Config, RunResult]:
    """A finished run of the test's own, to be damaged."""
    config = run_config(tmp_path, **SECTIONS)
    return config, train(config)


def wait_for_lines(file: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run wrote no lines"
        time.sleep(0.005)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    slow = {"name": user("slow"), "pause_s": 0.02}
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
    assert starts == [EPOCHS]
    assert again.metrics == result.metrics
    assert (result.folder / "metrics.jsonl").read_bytes() == lines
    assert (newest / "model.pt").stat().st_mtime_ns == written


def test_progress_is_told_from_where_the_run_stands(tmp_path: Path, finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    damage_newest(result.folder)
    heard: list[int] = []
    train(config, on_epoch=lambda line: heard.append(line["epoch"]))
    assert heard == [EPOCHS - 1]


def test_a_listener_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[int] = []

    def listen(line: dict[str, Any]) -> None:
        heard.append(line["epoch"])
        raise RuntimeError("a listener's own mistake")

    train(run_config(tmp_path, **SECTIONS), on_epoch=listen)
    assert heard == list(range(EPOCHS))
    assert "a listener's own mistake" in caplog.text


def damage_newest(folder: Path) -> None:
    flip_a_byte(checkpoint_path(folder, EPOCHS) / "model.pt")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "model.pt was altered": lambda folder: flip_a_byte(folder / "model.pt"),
    "selector.npz is missing": lambda folder: (folder / "selector.npz").unlink(),
    "it was never finished": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json: ": lambda folder: (folder / "manifest.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
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
def test_a_half_written_checkpoint_is_not_seen(
    files: int, finished: tuple[Config, RunResult], undisturbed: RunResult
) -> None:
    """Files are written one by one under their final names, the manifest last: a kill leaves the first few."""
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


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    state = {"model": {"weight": torch.zeros(3)}, "trainer": {"step": 1}, "selector": {"loss": np.zeros(3)}}
    assert write_checkpoint(tmp_path, 0, 1, **state, position={}) == newest_checkpoint(tmp_path)
    save = torch.save

    def full(value: Any, path: Path) -> None:
        if path.name == "trainer.pt":
            raise RuntimeError("PytorchStreamWriter failed writing file: file write failed")  # as torch says it
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not be written"):
        write_checkpoint(tmp_path, 0, 2, **state, position={})
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["epoch-000000-step-00000001"]


def test_random_layers_draw_the_same_after_a_resume(tmp_path: Path) -> None:
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


def test_a_torn_line_is_dropped(finished: tuple[Config, RunResult], undisturbed: RunResult) -> None:
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


def test_resume_never_refuses_a_folder_in_use(finished: tuple[Config, RunResult]) -> None:
    _, result = finished
    with pytest.raises(ValueError, match="holds a run already"):
        train(run_config(result.folder.parent, **SECTIONS, run={"resume": "never"}))
    fresh = run_config(result.folder.parent, "fresh", **SECTIONS, run={"resume": "never"})
    assert len(train(fresh).metrics) == EPOCHS


def test_other_data_of_the_same_config_are_refused(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match="was trained on other data"):
        train(config)
    assert (result.folder / "environment.json").read_text() == environment, "a refused run leaves the folder as it was"


def test_other_resources_are_the_same_run(finished: tuple[Config, RunResult]) -> None:
    config, result = finished
    moved = config.model_copy(update={"scaling": config.scaling.model_copy(update={"stream": "local"})})
    assert train(moved).metrics == result.metrics
