"""Reports of sweeps, comparisons and early exits, on folders of tiny runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from engine_runs import run_config
from exit_runs import exits_config

from rayprune.cli import cli
from rayprune.config import Config, make_config
from rayprune.engine.compare import compare
from rayprune.engine.evaluate import evaluate
from rayprune.engine.sweep_folder import TrialState, mark_front, result_row, write_results, write_state
from rayprune.engine.train import train
from rayprune.engine.trained import find_device
from rayprune.report.collecting import collect
from rayprune.report.page import render, write_pngs

SPACE = {"method.prune_ratio": [0.2, 0.6], "method.name": ["infobatch", "random_epoch"]}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    section: dict[str, Any] = {"baselines": ["full", "full_steps"], "seeds": 2, "parallel": 1}
    config = run_config(tmp_path_factory.mktemp("compared"), "asked", train={"epochs": 2}, compare=section)
    return compare(config)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    states = []
    for ratio in SPACE["method.prune_ratio"]:
        method = {"name": "infobatch", "prune_ratio": ratio}
        config = run_config(folder / "trials", f"t{ratio}", method=method, train={"epochs": 2})
        train(config)
        states.append(TrialState(f"t{ratio}", {"method.prune_ratio": ratio, "method.name": "infobatch"}, "finished"))
    states.append(TrialState("t9", {"method.prune_ratio": 0.9, "method.name": "<b>x</b>"}, "failed", "no <i>such</i>"))
    for state in states:
        write_state(folder, state)
    base: Config = make_config({"sweep": {"space": SPACE}})
    write_results(folder, base, mark_front([result_row(folder, state) for state in states]))
    (folder / "sweep.yaml").write_text(base.to_yaml())
    return folder


def test_a_comparison_begins_with_its_verdict(comparison: Path) -> None:
    report = json.loads((comparison / "compare.json").read_text())
    text = render(collect([comparison]))
    assert text.index(report["verdict"]["sentence"].split(":")[0]) < text.index("<svg") < text.index("All arms")
    for arm in report["arms"]:
        assert f"{arm['accuracy']:.2f} ± {arm['accuracy_sd']:.2f}" in text
    assert "Loss by epoch" in text  # the runs of the first seed


def test_a_sweep_shows_its_front_and_all_trials(sweep: Path) -> None:
    found = collect([sweep])
    text = render(found)
    assert text.index("3 trials: 2 finished, 1 failed") < text.index("<svg") < text.index("All trials")
    assert "<b>x" not in text
    assert "no &lt;i&gt;such" in text
    assert 1 <= len(found.runs) <= 2


def test_groups_and_runs_share_a_page(sweep: Path, comparison: Path, tmp_path: Path) -> None:
    run = next((sweep / "trials").glob("t0*"))
    found = collect([sweep, comparison, run])
    assert [group.kind for group in found.groups] == ["sweep", "comparison"]
    assert [record.folder for record in found.runs] == [run]
    render(found)
    names = [file.name for file in write_pngs(found, tmp_path)]
    assert {"pareto.png", "intervals1.png", "loss_by_epoch.png"} <= set(names)


def test_an_unfinished_comparison_tells_what_can_be_shown(comparison: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(comparison, folder)
    (folder / "compare.json").unlink()
    with pytest.raises(ValueError, match=r"no compare.json.*rayprune report .*/runs"):
        collect([folder])
    assert len(collect([folder / "runs"]).runs) == 4


@pytest.mark.parametrize("content", ["{", "{}", '{"arms": []}'])
def test_a_damaged_comparison_is_one_line(comparison: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "compare.json").write_text(content)
    done = CliRunner().invoke(cli, ["report", str(tmp_path)])
    assert isinstance(done.exception, ValueError)
    assert "again" in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_sweep_without_an_ended_trial_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{}")
    with pytest.raises(ValueError, match="try again when its first trial has ended"):
        collect([tmp_path])


def test_an_evaluated_run_shows_its_exits(tmp_path: Path) -> None:
    result = train(exits_config(tmp_path, train={"epochs": 1}))
    assert "multiply-adds" not in render(collect([result.folder]))
    evaluate(result.folder, None, find_device("cpu"), on_notice=lambda line: None)
    text = render(collect([result.folder]))
    assert "Early exits: accuracy against multiply-adds" in text
    assert "leaving early, p =" in text
    (result.folder / "exits" / "anytime.csv").write_text("")
    with pytest.raises(ValueError, match="evaluate the run again"):
        render(collect([result.folder]))
