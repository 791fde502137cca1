"""The command line as a user types it: what it prints and how it exits; trains in this process (num_workers 0)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.command_line import environment, rayprune
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
    assert pruned < full


def test_the_same_command_again_is_done_at_once(tmp_path: Path) -> None:
    words = ["train", "configs/digits_infobatch.yaml", *QUICK, f"run.storage_path={tmp_path}", "run.name=again"]
    first = rayprune(*words)
    before = (tmp_path / "again" / "metrics.jsonl").read_bytes()
    second = rayprune(*words)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "finished before" in second.stdout
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == before


def test_killed_and_started_again_it_equals_an_undisturbed_run(tmp_path: Path) -> None:
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
    assert "goes on at epoch" in again.stdout
    kept = ("plan_hash", "samples_trained", "val_accuracy", "train_loss", "samples_padded")
    by_epoch = {line["epoch"]: [line[key] for key in kept] for line in metrics(killed)}
    assert by_epoch == {line["epoch"]: [line[key] for key in kept] for line in metrics(tmp_path / "whole")}


def metrics_lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nope.yaml"], "nope.yaml"),
        (["train", "configs/digits_full.yaml", "train.epoch=3"], "'epochs'"),
        (["train", "configs/digits_full.yaml", "method.name=infobach"], "'infobatch'"),
        (["train", "configs/digits_full.yaml", "data.source=digit"], "'digits'"),
        (["train", "configs/digits_full.yaml", "model.name=resnet9"], "'resnet8'"),
        (["train", "configs/digits_full.yaml", "data.source=parquet", "data.path=/nowhere"], "/nowhere"),
        (["train", "train.epochs=3"], "no config"),
        (["methods", "infobach"], "'infobatch'"),
        (["trian"], "trian"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(words: list[str], said: str, tmp_path: Path) -> None:
    in_process = ["scaling.num_workers=0", "scaling.stream=local", f"run.storage_path={tmp_path}"]
    done = rayprune(*words, *(in_process if words[0] == "train" else []))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_diverged_training_exits_1_and_names_samples(tmp_path: Path) -> None:
    words = [*QUICK, f"run.storage_path={tmp_path}", "optim.lr=1e30", "train.max_nonfinite=10"]
    done = rayprune("train", "configs/digits_infobatch.yaml", *words)
    assert done.returncode == 1
    assert re.search(r"losses were NaN or infinite.*first sample ids \[\d+", done.stderr)
    assert "Traceback" not in done.stderr


def test_methods_are_listed_with_paper_and_defaults() -> None:
    listed, one = rayprune("methods"), rayprune("methods", "infobatch")
    assert (listed.returncode, one.returncode) == (0, 0)
    assert "random_epoch" in listed.stdout
    assert "2303.04947" in one.stdout
    assert "anneal_start=0.875" in one.stdout


def test_train_steps_are_listed_with_their_cost_beside_their_gain() -> None:
    listed, one = rayprune("methods"), rayprune("methods", "l2w")
    for found in (listed, one):
        assert found.returncode == 0
        words = " ".join(found.stdout.split())
        assert "3.7" in words
        assert "points" in words
    assert "epsilon=0.8" in one.stdout


def test_listing_methods_loads_neither_ray_nor_torch() -> None:
    code = "import sys; sys.argv = ['rayprune', 'methods']; from rayprune.cli.main import cli; " + (
        "cli.main(standalone_mode=False); print('LOADED', sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout


def test_the_example_method_of_the_readme_runs(tmp_path: Path) -> None:
    words = [
        "method.name=examples/keep_hardest.py:KeepHardest",
        "method.prune_ratio=0.3",
        f"run.storage_path={tmp_path}",
    ]
    done = rayprune("train", "configs/digits_full.yaml", *QUICK, *words)
    assert done.returncode == 0, done.stderr
    last = metrics(next(tmp_path.iterdir()))[-1]
    assert last["kept"] == 1437 - int(0.3 * 1437)


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
