"""`rayprune train` as a user types it: what it prints and writes; trains in this process (num_workers 0)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayprune.cli.train import epoch_row
from rayprune.engine.storage.checkpoint import newest_position
from tests.support.command_line import environment, loaded_modules, rayprune, start_group
from tests.support.paths import ROOT

QUICK = ["scaling.num_workers=0", "scaling.stream=local", "scaling.threads=1", "train.epochs=3", "model.name=mlp"]


def metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_runs_are_trained_and_compared(tmp_path: Path) -> None:
    configs = ["configs/digits_full.yaml", "configs/digits_infobatch.yaml"]
    done = rayprune("train", *configs, *QUICK, f"run.storage_path={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = re.findall(r"^ *\d/3 .*%$", done.stdout, flags=re.MULTILINE)
    assert len(lines) == 6
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert str(folder) in done.stdout
        last = metrics(folder)[-1]
        assert f"{last['samples_trained']:,}" in done.stdout
        assert f"{last['val_accuracy']:.2%}" in done.stdout
    full, pruned = (metrics(folder)[-1]["samples_trained"] for folder in folders)
    assert full == 3 * 1437
    assert [folder.name.rpartition("-")[0] for folder in folders] == [
        f"{Path(config).stem}-model_mlp-epochs_3" for config in configs
    ]
    assert re.search(
        r"^done in [\d.]+ s: [\d.]+ s in epochs, [\d.]+ s to start, open the data", done.stdout, re.MULTILINE
    )
    assert re.search(r"^run .* train s  selection s  wall s$", done.stdout, re.MULTILINE)
    assert "digits_full, compute above 100%: 105 rows of padding fill the last batch of each epoch" in done.stdout
    assert pruned < full


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    words = ["train", "configs/digits_infobatch.yaml", *QUICK, f"run.storage_path={tmp_path}", "run.name=again"]
    first = rayprune(*words)
    before = (tmp_path / "again" / "metrics.jsonl").read_bytes()
    with_workers = [word.replace("num_workers=0", "num_workers=2") for word in words]
    printed, loaded = loaded_modules(["ray", "torch", "sklearn"], *with_workers)
    assert first.returncode == 0
    assert loaded == set()
    assert printed.splitlines()[0] == "again: already finished"
    assert printed.partition("\nrun ")[2] == first.stdout.partition("\nrun ")[2], "the table and the folder"
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    quick = [word if word != "train.epochs=3" else "train.epochs=400" for word in QUICK]
    words = ["train", "configs/digits_infobatch.yaml", *quick, f"run.storage_path={tmp_path}", "run.name=stopped"]
    process = start_group(*words)
    out = ""
    assert process.stdout is not None
    while "  3/400" not in out:
        line = process.stdout.readline()
        assert line, process.communicate()
        out += line
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    epoch, step = newest_position(tmp_path / "stopped")
    assert err == f"stopped at epoch {epoch + 1}, step {step}: the same command continues from there\n"
    assert epoch >= 3
    last = f"train.stop_after={epoch + 1}"
    again = rayprune(*words, last)
    assert again.returncode == 0, again.stderr
    assert f"resumes at epoch {epoch + 1}" in again.stdout
    assert [line["epoch"] for line in metrics(tmp_path / "stopped")] == list(range(epoch + 1))


@pytest.mark.scenario
def test_a_killed_run_resumes_to_the_result_of_an_undisturbed_run(tmp_path: Path) -> None:
    quick = [word if word != "train.epochs=3" else "train.epochs=60" for word in QUICK]
    words = ["train", "configs/digits_infobatch.yaml", *quick, f"run.storage_path={tmp_path}"]
    assert rayprune(*words, "run.name=whole").returncode == 0
    command = [sys.executable, "-m", "rayprune", *words, "run.name=killed"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, env=environment())
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 60
    while not ((killed / "metrics.jsonl").exists() and len(metrics_lines(killed)) >= 3):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = rayprune(*words, "run.name=killed")
    assert again.returncode == 0, again.stderr
    assert "resumes at epoch" in again.stdout
    kept = ("plan_hash", "samples_trained", "val_accuracy", "train_loss", "samples_padded")
    by_epoch = {line["epoch"]: [line[key] for key in kept] for line in metrics(killed)}
    assert by_epoch == {line["epoch"]: [line[key] for key in kept] for line in metrics(tmp_path / "whole")}


def test_rows_of_epochs_have_one_clock_and_no_minus_zero() -> None:
    line = {"epoch": 1, "num_samples": 1000, "kept": 1000, "samples_trained": 2001, "train_loss": 0.5}
    line |= {"requested_prune_ratio": -0.0, "pruned_fraction": -0.0, "val_accuracy": None, "samples_collected": 1}
    line["seconds"] = {"epoch": 5.0, "validate": 3.0, "train": 1.5}
    cells = epoch_row(line, 4, samples_before=1001, kept=1999).split()
    assert cells == ["2/4", "0.0%", "0.0%", "0.5000", "–", "500", "2.00", "0.0%"]
    assert epoch_row(line, 4, samples_before=1001, kept=2000).split()[-1] == "0.0%"  # -0.05% rounds to it


def metrics_lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_diverged_training_exits_1_and_names_samples(tmp_path: Path) -> None:
    words = [*QUICK, f"run.storage_path={tmp_path}", "optim.lr=1e30", "train.max_nonfinite=10"]
    done = rayprune("train", "configs/digits_infobatch.yaml", *words)
    assert done.returncode == 1
    assert re.search(r"losses were NaN or infinite.*first sample ids \[\d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_method_of_the_users_own_file_runs(tmp_path: Path) -> None:
    words = [
        "method.name=examples/keep_hardest.py:KeepHardest",
        "method.prune_ratio=0.3",
        f"run.storage_path={tmp_path}",
    ]
    done = rayprune("train", "configs/digits_full.yaml", *QUICK, *words)
    assert done.returncode == 0, done.stderr
    last = metrics(next(tmp_path.iterdir()))[-1]
    assert last["kept"] == 1437 - int(0.3 * 1437)
