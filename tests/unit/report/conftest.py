"""Runs, a comparison and a sweep, each made once for a module of tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayprune.config import Config, make_config
from rayprune.engine.train.driver import train
from rayprune.experiments.compare.runner import compare
from rayprune.experiments.sweep.folder import TrialState, mark_front, result_row, write_results, write_state
from tests.support.reports import copy_of, two_runs
from tests.support.runs import run_config


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_of(runs[1], tmp_path / "run")


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    section: dict[str, Any] = {"baselines": ["full", "full_steps"], "seeds": 2, "parallel": 1}
    return compare(run_config(tmp_path_factory.mktemp("compared"), "two", train={"epochs": 2}, compare=section))


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    space = {"method.prune_ratio": [0.2, 0.6], "method.name": ["infobatch", "random_epoch"]}
    states = []
    for ratio in space["method.prune_ratio"]:
        method = {"name": "infobatch", "prune_ratio": ratio}
        train(run_config(folder / "trials", f"t{ratio}", method=method, train={"epochs": 2}))
        states.append(TrialState(f"t{ratio}", {"method.prune_ratio": ratio, "method.name": "infobatch"}, "finished"))
    states.append(TrialState("t9", {"method.prune_ratio": 0.9, "method.name": "<b>x</b>"}, "failed", "no <i>such</i>"))
    for state in states:
        write_state(folder, state)
    base: Config = make_config({"sweep": {"space": space}})
    write_results(folder, base, mark_front([result_row(folder, state) for state in states]))
    (folder / "sweep.yaml").write_text(base.to_yaml())
    return folder
