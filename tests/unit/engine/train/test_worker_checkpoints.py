"""Checkpoints inside epochs: a run killed at any step resumes from the last one and gives the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import newest_checkpoint, newest_position
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import RunResult, train
from rayprune.errors import TrainingPaused
from tests.support.runs import assert_same_run, run_config, user

EVERY, BATCH, EPOCHS = 3, 16, 4
SCRIPT = """
import sys, yaml
from rayprune.config import make_config
from rayprune.engine.train.driver import train
if __name__ == "__main__":
    train(make_config(yaml.safe_load(sys.argv[1])))
"""


def make(folder: Path, name: str, run: dict[str, Any] | None = None, **model: Any) -> Config:
    """Return a run that saves every EVERY steps and counts its steps in `<name>.steps`."""
    return run_config(
        folder,
        name,
        model={"name": user("counted"), "log": str(folder / f"{name}.steps"), **model},
        train={"epochs": EPOCHS, "batch_size": BATCH},
        data={"augment": {"crop": 1}},
        run={"checkpoint_steps": EVERY, "keep_checkpoints": 2} if run is None else run,
    )


def steps_of(config: Config) -> int:
    """Return how many training steps the run has taken, those done again included."""
    return Path(config.model.options["log"]).stat().st_size


def start(config: Config) -> subprocess.Popen[bytes]:
    """Train in a process of its own."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, config.to_yaml()], env=environment, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[int]]:
    """The run that every killed one must equal, and the steps of its epochs."""
    config = make(tmp_path_factory.mktemp("undisturbed"), "whole")
    result = train(config)
    steps = [-(-int(line["kept"]) // BATCH) for line in result.metrics]
    assert sum(steps) == steps_of(config)
    return result, steps


_LONG = [pytest.param(step, marks=pytest.mark.scenario) for step in (5, 24, 50)]


@pytest.mark.parametrize("kill_at", [2, 12, 33, *_LONG])
def test_a_run_killed_at_any_step_repeats_only_the_steps_since_its_checkpoint(
    kill_at: int, tmp_path: Path, undisturbed: tuple[RunResult, list[int]]
) -> None:
    whole, steps = undisturbed
    assert kill_at < sum(steps)
    config = make(tmp_path, "killed", kill_at=kill_at)
    assert start(config).wait(60) == -signal.SIGKILL
    assert steps_of(config) == kill_at - 1
    epoch, step = newest_position(tmp_path / "killed")
    saved = sum(steps[:epoch]) + step
    # The newest checkpoint may still have been under way; the one before it was not.
    assert kill_at - 1 - saved < 2 * EVERY
    again = train(config)
    assert steps_of(config) == kill_at - 1 + sum(steps) - saved, "steps were done again without need"
    assert_same_run(again, whole)


def test_a_damaged_checkpoint_inside_an_epoch_is_skipped(
    tmp_path: Path, undisturbed: tuple[RunResult, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    config = make(tmp_path, "killed", kill_at=30)
    assert start(config).wait(60) == -signal.SIGKILL
    newest = newest_checkpoint(tmp_path / "killed")
    assert newest is not None
    assert "-step-" in newest.name
    content = bytearray((newest / "selector.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "selector.npz").write_bytes(content)
    again = train(config)
    assert "selector.npz was altered" in caplog.text
    assert_same_run(again, undisturbed[0])


def test_sigterm_saves_the_run_and_it_resumes(tmp_path: Path, undisturbed: tuple[RunResult, list[int]]) -> None:
    config = make(tmp_path, "paused", pause_s=0.05)
    process = start(config)
    while not Path(config.model.options["log"]).exists() or steps_of(config) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    signaled = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - signaled < 10
    assert process.returncode == 1
    assert b"run the same command to continue" in errors
    before = steps_of(config)
    epoch, step = newest_position(tmp_path / "paused")
    assert sum(undisturbed[1][:epoch]) + step == before, "every step taken was saved"
    assert_same_run(train(config), undisturbed[0])
    assert steps_of(config) == sum(undisturbed[1])


def test_checkpoints_inside_an_epoch_are_deleted_at_its_end(undisturbed: tuple[RunResult, list[int]]) -> None:
    names = sorted(folder.name for folder in (undisturbed[0].folder / "checkpoints").iterdir())
    assert names == ["epoch-000003", "epoch-000004"]


def test_a_run_starts_from_a_checkpoint_of_another_folder(
    tmp_path: Path, undisturbed: tuple[RunResult, list[int]]
) -> None:
    config = make(tmp_path, "killed", kill_at=33)
    assert start(config).wait(60) == -signal.SIGKILL
    killed = tmp_path / "killed"
    before = {file: file.stat().st_mtime_ns for file in killed.rglob("*")}
    elsewhere = {"name": "elsewhere", "resume": str(killed)}
    again = train(config.model_copy(update={"run": config.run.model_copy(update=elsewhere)}))
    assert again.folder == tmp_path / "elsewhere"
    assert_same_run(again, undisturbed[0])
    assert {file: file.stat().st_mtime_ns for file in killed.rglob("*")} == before


def test_a_run_continues_with_another_number_of_score_shards(
    tmp_path: Path, undisturbed: tuple[RunResult, list[int]]
) -> None:
    config = make(tmp_path, "killed", kill_at=33)
    sharded = [
        config.model_copy(update={"scaling": config.scaling.model_copy(update={"score_shards": n})}) for n in (3, 2)
    ]
    assert start(sharded[0]).wait(60) == -signal.SIGKILL
    assert newest_position(tmp_path / "killed") > (1, 0)
    assert_same_run(train(sharded[1]), undisturbed[0])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "holds no intact checkpoint"),
        ("whole", "holds another run.*train.seed 0 → 1"),
        ("whole/checkpoints/epoch-000004", "holds another run.*train.seed 0 → 1"),
    ],
)
def test_a_path_that_cannot_be_resumed_is_refused(
    path: str, words: str, tmp_path: Path, undisturbed: tuple[RunResult, list[int]]
) -> None:
    config = run_config(
        tmp_path,
        "mine",
        model=undisturbed_model(undisturbed),
        train={"epochs": EPOCHS, "batch_size": BATCH, "seed": 1},
        data={"augment": {"crop": 1}},
        run={"resume": str(undisturbed[0].folder.parent / path)},
    )
    with pytest.raises(ValueError, match=words):
        train(config)
    assert not (tmp_path / "mine").exists()


def undisturbed_model(undisturbed: tuple[RunResult, list[int]]) -> dict[str, Any]:
    """Return the model section of the undisturbed run."""
    return {"name": user("counted"), "log": str(undisturbed[0].folder.parent / "whole.steps")}


@pytest.mark.parametrize(("kill_epoch", "resumed"), [(2, 0), (3, 3)])
def test_checkpoints_are_written_every_so_many_epochs(
    kill_epoch: int, resumed: int, tmp_path: Path, undisturbed: tuple[RunResult, list[int]]
) -> None:
    whole, steps = undisturbed
    config = make(tmp_path, "seldom", {"checkpoint_epochs": 3}, kill_at=sum(steps[:kill_epoch]) + 4)
    assert start(config).wait(60) == -signal.SIGKILL
    assert newest_position(tmp_path / "seldom") == (resumed, 0)
    assert len(read_metrics(tmp_path / "seldom")) == kill_epoch, "every epoch has its line"
    assert_same_run(train(config), whole)
    names = sorted(folder.name for folder in (tmp_path / "seldom" / "checkpoints").glob("epoch-*"))
    assert names == ["epoch-000003", "epoch-000004"], "the third epoch and the last"


def test_a_run_that_leaves_between_checkpoints_saves(tmp_path: Path, undisturbed: tuple[RunResult, list[int]]) -> None:
    config = make(tmp_path, "paused", {"checkpoint_epochs": 10}, pause_s=0.05)
    pause = threading.Event()
    with pytest.raises(TrainingPaused):
        train(config, on_epoch=lambda line: pause.set(), pause=pause)
    assert newest_position(tmp_path / "paused") > (0, 0)
    steps = steps_of(config)
    assert_same_run(train(config), undisturbed[0])
    assert steps_of(config) == sum(undisturbed[1]) > steps, "no step was done again"
