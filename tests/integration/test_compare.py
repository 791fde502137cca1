"""A comparison with concurrent runs, from the command line: stopping, resuming, and which times count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rayprune.config import load_config
from rayprune.errors import TrainingFailed
from rayprune.experiments.compare.runner import CompareListeners, compare
from tests.support.paths import ROOT
from tests.support.runs import run_config, same_weights

CONFIG = ROOT / "configs" / "digits_compare.yaml"
WORDS = [
    "run.name=it",
    "compare.seeds=2",
    "compare.baselines=[shuffled,full_steps]",
    "train.epochs=4",
    "compare.tune=false",
    "compare.timed_seeds=1",
]


def start(folder: Path, *more: str, deaf: bool = False) -> subprocess.Popen[str]:
    """Start a comparison; `deaf`: with Ctrl-C ignored, as a shell starts what it puts into the background."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "rayprune", "compare", str(CONFIG), *WORDS, *more]
    command.append(f"run.storage_path={folder}")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if deaf else None
    try:
        return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, env=environment)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=150)
    return process.returncode, out, err


def report_in(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "it" / "compare.json").read_text())
    return report


def test_concurrent_runs_give_the_same_results_as_single_ones(tmp_path: Path) -> None:
    parallel = start(tmp_path / "two", "compare.parallel=2", deaf=True)
    shared = tmp_path / "two" / "it" / "shared_runs.json"
    deadline = time.monotonic() + 120
    while not shared.exists():
        assert time.monotonic() < deadline
        assert parallel.poll() is None, finish(parallel)
        time.sleep(0.02)
    parallel.send_signal(signal.SIGTERM)
    code, _, err = finish(parallel)
    assert code == 1, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    finished: list[bool] = []
    again = load_config(CONFIG, [*WORDS, "compare.parallel=2", f"run.storage_path={tmp_path / 'two'}"])
    compare(again, CompareListeners(lambda _, arm, seed, done, settings: finished.append(done)))
    assert any(finished), "the runs that had ended were trained again"
    compare(load_config(CONFIG, [*WORDS, f"run.storage_path={tmp_path / 'one'}"]))
    two, one = report_in(tmp_path / "two"), report_in(tmp_path / "one")
    assert "runs of seed 0 trained alone, the others side by side and not timed" in two["timing"]
    assert (two["timed_seeds"], one["timed_seeds"]) == ([0], [0, 1])
    for ours, theirs in zip(two["arms"], one["arms"], strict=True):
        assert [run["alone"] for run in ours["runs"]] == [True, False]
        assert [run["accuracy"] for run in ours["runs"]] == [run["accuracy"] for run in theirs["runs"]]
        assert ours["to_full"] == theirs["to_full"]
        assert ours["seconds"] == ours["runs"][0]["seconds"]
        assert ours["seconds_to_full"]["low"] is None
        for run in ours["runs"]:
            assert same_weights(tmp_path / "two/it/runs" / run["folder"], tmp_path / "one/it/runs" / run["folder"])
    # One run at a time later: what ran beside others is still not timed.
    compare(load_config(CONFIG, [*WORDS, f"run.storage_path={tmp_path / 'two'}"]))
    assert report_in(tmp_path / "two")["timed_seeds"] == [0]


def test_a_failed_run_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": {"name": "infobatch"}, "data": {"augment": {"crop": 0}}}
    section = {"seeds": 2, "baselines": ["ratio_0"], "parallel": 2, "timed_seeds": 1}
    config = run_config(tmp_path, "it", **keys, scaling={"threads": 1}, compare=section)
    obstacle = tmp_path / "it" / "runs" / "infobatch-seed1"
    heard: list[str] = []

    def spoil(number: str, arm: Any, seed: int, finished: bool, settings: Any) -> None:
        heard.append(f"{arm.name}-seed{seed}")
        obstacle.parent.mkdir(parents=True, exist_ok=True)
        obstacle.write_text("in the way")

    with pytest.raises(TrainingFailed, match=r"run infobatch-seed1: .*can't be written") as failure:
        compare(config, CompareListeners(spoil))
    assert "\n" not in str(failure.value)
    assert heard[:3] == ["full-seed0", "infobatch-seed0", "ratio_0-seed0"]
    obstacle.unlink()
    finished: dict[str, bool] = {}
    compare(config, CompareListeners(lambda _, arm, seed, done, __: finished.update({f"{arm.name}-seed{seed}": done})))
    assert all(finished[name] for name in heard[:3])
    assert len(report_in(tmp_path)["arms"]) == 3
    assert not (tmp_path / "it" / ".tune").exists()


def test_more_concurrent_runs_than_fit_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, "it", method={"name": "infobatch"}, compare={"parallel": 4096})
    with pytest.raises(ValueError, match=r"compare.parallel 4096 .* set compare.parallel="):
        compare(config)
    assert not (tmp_path / "it").exists()
