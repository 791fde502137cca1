"""Reports of sweeps, comparisons and early exits, on folders of tiny runs."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner

from rayprune.cli.main import cli
from rayprune.config import Config, make_config
from rayprune.engine.train.driver import train
from rayprune.experiments.compare.runner import compare
from rayprune.experiments.early_exit.evaluate import evaluate, find_device
from rayprune.experiments.sweep.folder import TrialState, mark_front, result_row, write_results, write_state
from rayprune.report.collect import collect
from rayprune.report.page import render, write_pngs
from tests.support.exit_runs import exits_config
from tests.support.runs import run_config

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


def _copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("checkpoints")))


def test_a_mixed_report_says_of_what_each_part_is(comparison: Path, tmp_path: Path) -> None:
    folder = _copied(next((comparison / "runs").glob("full-seed0")), tmp_path / "foreign")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("source: digits", "source: cifar10"))
    text = render(collect([comparison, folder]))
    lead = text.split('class="lead">')[1].split("<")[0]
    assert lead.startswith("a comparison on digits, ")
    assert "; a run of full, 2 epochs on cifar10" in lead
    assert "Of each arm the run" not in text
    assert "Those that were named. The runs of a sweep or a comparison are shown where" in text
    assert "Of each arm the run of seed 0." in render(collect([comparison]))


def test_runs_of_two_comparisons_are_told_apart(comparison: Path, tmp_path: Path) -> None:
    folders = [_copied(comparison, tmp_path / side / "same") for side in ("a", "b")]
    found = collect(folders)
    names = [run.name for run in found.runs]
    assert len(names) == len(set(names)) == 4
    assert names[0] == "a/same: full"
    assert "a/same: Of each arm the run of seed 0. b/same: Of each" in found.runs_text
    assert "Comparison b/same" in render(found)
    assert [group.name for group in collect([tmp_path / "a"]).groups] == ["same"]  # a folder of results


def test_a_damaged_run_costs_a_comparison_only_its_curves(comparison: Path, tmp_path: Path) -> None:
    folder = _copied(comparison, tmp_path / "compared")
    (folder / "runs" / "full-seed0" / "environment.json").write_text("{")
    found = collect([folder])
    assert len(found.runs) == 1
    assert any("full is not among" in note and "environment.json" in note for note in found.groups[0].notes)


def test_a_comparison_of_an_older_version_is_shown_with_gaps(comparison: Path, tmp_path: Path) -> None:
    report = json.loads((comparison / "compare.json").read_text())
    for arm in report["arms"]:
        for key in ("flops", "worst_class", "compute_saved"):
            del arm[key]
    (tmp_path / "compare.json").write_text(json.dumps(report))
    found = collect([tmp_path])
    assert {row[7] for row in found.groups[0].table.rows} == {"–"}
    render(found)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda report: report["arms"][1]["runs"].pop(), "1 runs of .* for 2 seeds"),
        (lambda report: report["arms"][1].update(accuracy=None), "arms.1.accuracy"),
        (lambda report: report["arms"][0].update(epochs=[]), "arms.0.epochs"),
        (lambda report: report["arms"].pop(0), "full training"),
        (lambda report: report.update(verdict="yes"), "verdict"),
    ],
)
def test_a_comparison_that_lacks_something_names_file_and_cure(
    comparison: Path, tmp_path: Path, change: Any, told: str
) -> None:
    report = json.loads((comparison / "compare.json").read_text())
    change(report)
    (tmp_path / "compare.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=f"compare.json .*{told}.*again"):
        collect([tmp_path])


def test_a_sweep_of_an_older_version_is_shown_with_gaps(sweep: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(sweep / "results.parquet").drop(columns=["flops", "error", "seconds"])
    table.to_parquet(tmp_path / "results.parquet")
    text = render(collect([tmp_path]))
    assert "3 trials: 2 finished, 1 failed" in text
    assert "–" in text


def test_swept_values_that_are_missing_or_long_are_drawn(sweep: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(sweep / "results.parquet")
    table["method.name"] = [None, "x" * 5000, "y"]
    table.to_parquet(tmp_path / "results.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ">None<" not in render(collect([tmp_path]))


def test_a_damaged_sweep_names_file_and_cure(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.parquet"
    table = pd.read_parquet(sweep / "results.parquet")
    content = (sweep / "results.parquet").read_bytes()
    damaged = [content[:-40], content[:3000].replace(content[8:200], b"x" * 192) + content[3000:], b""]
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=r"results.parquet .*run the same rayprune sweep again"):
            collect([tmp_path])
    for changed in (table.drop(columns="status"), table.assign(seconds="long"), table[:0]):
        changed.to_parquet(file)
        with pytest.raises(ValueError, match=r"results.parquet .*run the same rayprune sweep again"):
            collect([tmp_path])


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
