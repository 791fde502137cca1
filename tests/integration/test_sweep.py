"""Sweeps from the command line on a Ray of their own: failures, kills, early stops, and released resources."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
from click.testing import CliRunner

from rayprune.cli.main import cli
from rayprune.config import load_config
from rayprune.engine.storage.checkpoint import newest_checkpoint
from rayprune.engine.storage.lock import lock_folder
from rayprune.experiments.sweep.runner import SweepListeners, sweep
from tests.support.http_server import files_with, samples, serve
from tests.support.paths import ROOT
from tests.support.runs import user

CONFIG = """
data: {source: digits, limit: 300}
model: {name: mlp}
method: {name: infobatch, prune_ratio: 0.3}
train: {epochs: 2, batch_size: 32, max_nonfinite: 1}
optim: {lr: 0.05}
scaling: {num_workers: 0}
sweep:
  max_failures: 0
"""
ASHA = [
    "train.epochs=12",
    "sweep.scheduler=asha",
    "sweep.grace_epochs=2",
    "sweep.reduction_factor=2",
    "sweep.objective=accuracy",
    "sweep.max_concurrent=1",
]
# What a sweep leaves behind is looked at in the process that ran it.
SCRIPT = """
import sys
from pathlib import Path
import ray
from rayprune.config import load_config
from rayprune.experiments.sweep.runner import sweep
config = load_config(sys.argv[1], sys.argv[3:])
result = sweep(config, Path(sys.argv[2]))
print("CPUS", ray.available_resources().get("CPU", 0.0), ray.cluster_resources()["CPU"])
"""


def start(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def config_in(folder: Path, text: str = "") -> Path:
    file = folder / "small.yaml"
    file.write_text(CONFIG + text)
    return file


def trials(folder: Path) -> Path:
    """Return the folder of the trials of the one sweep in a folder."""
    (sweep,) = folder.glob("*-sweep-*")
    return sweep / "trials"


@pytest.mark.scenario
def test_trials_get_secrets_that_no_file_of_tune_has(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    found: list[str] = []
    of_tune: list[str] = []

    def look(*_: object) -> None:
        found.extend(files_with("SECRET", tmp_path))
        of_tune.extend(files_with("***@127.0.0.1", tmp_path / "sweep" / ".tune"))

    with serve(samples(), "a.parquet", "me:SECRET-1", ("SECRET-2",)) as address:
        config = load_config(
            config_in(tmp_path, "  space: {optim.lr: [0.01, 0.02]}\n"),
            ["data.source=parquet", f"data.path=http://me:SECRET-1@{address}?token=SECRET-2"],
        )
        rows = sweep(config, tmp_path / "sweep", SweepListeners(on_epoch=look, on_trial=look)).rows
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert found + files_with("SECRET", tmp_path) == []
    assert of_tune


@pytest.mark.scenario
def test_a_killed_sweep_resumes_despite_a_failing_trial(tmp_path: Path) -> None:
    # The second of four trials is long enough to be killed in, twice; the last two diverge.
    space = "  space:\n    optim.lr: [0.05, 1.0e+30]\n    train.epochs: [2, 200]\n"
    words = ("-m", "rayprune", "sweep", str(config_in(tmp_path, space)), f"run.storage_path={tmp_path}")
    known = 2
    for kill, expected in ((signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)):
        process = start(*words)
        deadline = time.monotonic() + 120
        while "000" not in ended(tmp_path) or lines_of_the_long_trial(tmp_path) <= known:
            assert time.monotonic() < deadline
            assert process.poll() is None, finish(process)
            time.sleep(0.02)
        process.send_signal(kill)
        code, _, err = finish(process)
        assert code == expected
        assert "Traceback" not in err
        known = lines_of_the_long_trial(tmp_path)
        assert known < 200, "the trial ended before it could be killed"
    (short,) = trials(tmp_path).glob("000-*/metrics.jsonl")
    before = short.stat().st_mtime_ns
    code, out, err = finish(start(*words))
    assert code == 0, err
    assert "already ended" in out
    assert short.stat().st_mtime_ns == before
    table = pd.read_parquet(trials(tmp_path).parent / "results.parquet")
    assert list(table["status"]) == ["finished", "finished", "failed", "failed"]
    assert list(table["epochs"][:2]) == [2, 200]
    assert all("NaN or infinite" in error for error in table["error"][2:])
    # Gone on with, not begun again: one line an epoch, but for one that a kill came after.
    assert lines_of_the_long_trial(tmp_path) <= 202
    assert (trials(tmp_path).parent / "pareto.png").exists()


def ended(folder: Path) -> set[str]:
    files = folder.glob("*-sweep-*/trials/*/trial.json")
    return {file.parent.name.split("-")[0] for file in files if '"finished"' in file.read_text()}


def lines_of_the_long_trial(folder: Path) -> int:
    return sum(len(file.read_text().splitlines()) for file in folder.glob("*-sweep-*/trials/001-*/metrics.jsonl"))


@pytest.mark.scenario
def test_a_stopped_ray_train_gives_its_cpus_back(tmp_path: Path) -> None:
    space = "  space:\n    optim.lr: [0.1, 0.00001]\n"
    words = [*ASHA, "scaling.num_workers=1", "scaling.stream=local"]
    code, out, err = finish(start("-c", SCRIPT, str(config_in(tmp_path, space)), str(tmp_path / "sweep"), *words))
    assert code == 0, err
    held, there = out.split("CPUS ")[1].split()
    assert held == there
    table = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
    assert list(table["status"]) == ["finished", "stopped"]
    assert 2 <= table["epochs"][1] < 12


def test_asha_stops_trials_and_their_folders_are_intact(tmp_path: Path) -> None:
    space = "  space:\n    optim.lr: [0.1, 0.00001, 0.00002]\n"
    config = load_config(config_in(tmp_path, space), ASHA)
    free, ctrl_c = ray.available_resources()["CPU"], signal.getsignal(signal.SIGINT)
    result = sweep(config, tmp_path / "sweep")
    assert signal.getsignal(signal.SIGINT) is ctrl_c, "Tune has left its own handler"
    assert ray.available_resources()["CPU"] == free
    assert [row["status"] for row in result.rows] == ["finished", "stopped", "stopped"]
    assert [row["pareto"] for row in result.rows] == [True, False, False]
    # A stopped trial is a run that could go on: its lock is free and its checkpoint sound.
    trial = tmp_path / "sweep" / "trials" / result.rows[1]["trial"]
    assert newest_checkpoint(trial) is not None
    with lock_folder(trial):
        pass
    heard: list[str] = []
    again = sweep(config, tmp_path / "sweep", SweepListeners(on_trial=lambda row: heard.append(row["trial"])))
    assert heard == []
    assert again.rows == result.rows


@pytest.mark.scenario
def test_a_crashed_trial_is_restarted_and_its_error_is_in_the_table(tmp_path: Path) -> None:
    log = tmp_path / "steps"
    space = (
        f"  space:\n    model: [{{name: '{user('broken')}'}}, {{name: '{user('counted')}', log: {log}, kill_at: 5}}]\n"
    )
    result = sweep(load_config(config_in(tmp_path, space), ["sweep.max_failures=1"]), tmp_path / "sweep")
    broken, killed = result.rows
    assert broken["status"] == "failed"
    assert broken["error"].endswith("ValueError: this model is broken")
    assert Path(f"{log}.killed").exists()
    assert (killed["status"], killed["error"], killed["epochs"]) == ("finished", None, 2)


def test_resources_that_no_trial_can_get_are_refused(tmp_path: Path) -> None:
    space = "  space:\n    optim.lr: [0.1, 0.2]\n"
    for words, said in (
        (["scaling.threads=4096"], r"no trial can have 4096 threads.*set scaling.threads=4"),
        (["scaling.threads=2", "sweep.max_concurrent=3"], r"set sweep.max_concurrent=2"),
        (["scaling.num_workers=4", "scaling.cpus_per_worker=1"], r"set scaling.cpus_per_worker=0.97"),
        (["scaling.num_workers=[1,2]"], r"set scaling.num_workers=1"),
    ):
        with pytest.raises(ValueError, match=said):
            sweep(load_config(config_in(tmp_path, space), words), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_no_finished_trial_is_an_error_and_another_sweeps_folder_is_refused(tmp_path: Path) -> None:
    words = ["sweep", str(config_in(tmp_path, "  space:\n    optim.lr: [1.0e+30]\n"))]
    words += [f"run.storage_path={tmp_path}", "run.name=mine"]
    done = CliRunner().invoke(cli, words)
    assert isinstance(done.exception, RuntimeError)
    assert "no trial finished" in str(done.exception)
    refused = CliRunner().invoke(cli, [*words, "train.epochs=3"])
    assert isinstance(refused.exception, ValueError)
    assert "holds another sweep" in str(refused.exception)
