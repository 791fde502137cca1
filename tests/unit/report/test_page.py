"""The page and its plots: complete, self-contained, escaped, and possible for unfinished and odd runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from rayprune.engine.train.driver import train
from rayprune.experiments.compare.statistics import paired_ratio
from rayprune.experiments.early_exit.evaluate import evaluate, find_device
from rayprune.report.collect import collect
from rayprune.report.page import render, write_pngs
from rayprune.report.read import read_run
from rayprune.report.tables import epochs_table
from tests.support.exit_runs import exits_config
from tests.support.reports import copy_of

NASTY = '<img src=x onerror="alert(1)">&$x$'


class _Page(HTMLParser):
    """The tags of a page, and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action") and value:
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_several_runs_make_one_page_that_loads_nothing(runs: list[Path]) -> None:
    text = render(collect(runs))
    page = _Page(text)
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert "script" not in page.tags
    assert "http" not in text
    assert "url(" not in text.replace("url(#", "")
    assert "mathdefault" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") >= 11
    for folder in runs:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert f"{last['val_accuracy']:.2%}" in text
        assert f"{last['samples_trained']:,}" in text
    for heading in (
        "Loss by samples trained",
        "Accuracy by training seconds",
        "Where the seconds went",
        "Kept of each class",
    ):
        assert heading in text


def test_several_runs_have_one_legend_and_what_differs(runs: list[Path]) -> None:
    text = render(collect(runs))
    assert text.count('class="legend"') == 1
    differing = text.split("What differs</h3>")[1].split("</dl>")[0]
    assert "<dt>full</dt><dd>method.name = full</dd>" in differing
    assert "<dt>pruned</dt><dd>method.name = infobatch, method.ema = 0.5</dd>" in differing


def test_a_single_run_begins_with_its_headline(runs: list[Path]) -> None:
    text = render(collect([runs[1]]))
    assert text.index("of the sample visits of full training over the same 4 epochs.") < text.index("<table")
    assert "What differs" not in text
    assert 'class="legend"' not in text
    assert "of the sample visits of full training" not in render(collect(runs))


def test_every_plot_becomes_a_png_file(runs: list[Path], tmp_path: Path) -> None:
    files = write_pngs(collect(runs), tmp_path / "png")
    assert len(files) >= 11
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_names_with_html_are_escaped(runs: list[Path], tmp_path: Path) -> None:
    text = render(collect([copy_of(runs[1], tmp_path / name) for name in (NASTY, "other")]))
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert "x" not in _Page(text).loads


def test_names_in_any_script_give_no_warnings_of_glyphs(run: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(run, tmp_path / name)) for name in ("跑一次", "🚀 नमस्ते")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "跑一次" in render(collect(folders))
        write_pngs(collect(folders), tmp_path / "png")


def test_a_running_run_is_shown_up_to_its_last_epoch(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    (run / "scores.parquet").unlink()
    text = render(collect([run]))
    assert "1 of 4 epochs so far" in text
    assert "no scores yet" in text


def test_one_epoch_is_called_one(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    (run / "config.yaml").write_text("train: {epochs: 1}\n")
    text = render(collect([run]))
    assert "1 epoch on" in text
    assert "1 epochs" not in text


@pytest.mark.parametrize(
    "values",
    [
        {"seconds": None, "seconds_collected": None},
        {"seconds": {"epoch": None, "train": "3", "select": [1]}},
        {"wall_time": None},
        {"pruned_fraction": None, "requested_prune_ratio": "half"},
        {"num_samples": None, "samples_trained": "many"},
        {"selection": {"threshold": "high", "class_kept": ["a"], "budget_so_far": "all"}},
        {"selection": {"budget_so_far": float("nan")}},
        {"selection": None},
        {"score_quantiles": {"loss": [None] * 7, "other": "?"}},
        {"val_accuracy": [1], "train_loss": True, "val_loss": float("inf"), "world_size": -1},
        {"val_accuracy": float("inf"), "pruned_fraction": -float("inf"), "wall_time": float("inf")},
    ],
)
def test_odd_values_of_an_epoch_are_shown_as_missing(run: Path, values: dict[str, object]) -> None:
    file = run / "metrics.jsonl"
    lines = [json.loads(line) | values for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = render(collect([run]))
    assert ">None<" not in text
    assert ">nan" not in text
    assert re.search(r">-?inf[%<]", text) is None
    assert len(epochs_table(read_run(run)).rows) == len(lines)


def test_a_run_without_validation_is_shown_with_gaps(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{**line, "val_loss": None, "val_accuracy": None, "train_loss": None} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert "–" in render(collect([run]))


def test_odd_settings_and_versions_are_shown_as_missing(run: Path) -> None:
    (run / "environment.json").write_text('{"schema": 1, "versions": null, "gpu": [1]}')
    (run / "config.yaml").write_text("method: infobatch\ntrain: {epochs: many, stop_after: true}\ndata: null\n")
    assert "4 epochs" in render(collect([run]))


def test_a_comparison_begins_with_its_verdict(comparison: Path) -> None:
    report = json.loads((comparison / "compare.json").read_text())
    text = render(collect([comparison]))
    assert text.index(report["verdict"]["sentence"].split(":")[0]) < text.index("<svg") < text.index("All arms")
    for arm in report["arms"]:
        assert f"{arm['accuracy']:.2f} ± {arm['accuracy_sd']:.2f}" in text
    assert "Loss by epoch" in text  # the runs of the first seed


def test_two_seeds_with_uneven_times_have_a_boundless_interval(comparison: Path, tmp_path: Path) -> None:
    folder = copy_of(comparison, tmp_path / "copy")
    report = json.loads((folder / "compare.json").read_text())
    ratio = paired_ratio([1.0, 9.0], [2.0, 1.0], 0.999)
    assert ratio.high is not None
    assert ratio.high > 1e6
    report["arms"][1]["seconds_to_full"] = dataclasses.asdict(ratio)
    (folder / "compare.json").write_text(json.dumps(report))
    assert f"{ratio.mean:.1%}" in render(collect([folder]))


def test_a_sweep_shows_its_front_and_all_trials(sweep: Path) -> None:
    collected = collect([sweep])
    text = render(collected)
    assert text.index("3 trials: 2 finished, 1 failed") < text.index("<svg") < text.index("All trials")
    assert "<b>x" not in text
    assert "no &lt;i&gt;such" in text
    assert 1 <= len(collected.runs) <= 2


def test_missing_and_long_swept_values_are_drawn(sweep: Path, tmp_path: Path) -> None:
    table = pd.read_parquet(sweep / "results.parquet")
    table["method.name"] = [None, "x" * 5000, "y"]
    table.to_parquet(tmp_path / "results.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ">None<" not in render(collect([tmp_path]))


def test_groups_and_runs_share_a_page(sweep: Path, comparison: Path, tmp_path: Path) -> None:
    run = next((sweep / "trials").glob("t0*"))
    collected = collect([sweep, comparison, run])
    assert [group.kind for group in collected.groups] == ["sweep", "comparison"]
    assert [record.folder for record in collected.runs] == [run]
    render(collected)
    names = [file.name for file in write_pngs(collected, tmp_path)]
    assert {"pareto.png", "intervals1.png", "loss_by_epoch.png"} <= set(names)


def test_an_evaluated_run_shows_its_exits(tmp_path: Path) -> None:
    result = train(exits_config(tmp_path, train={"epochs": 1}))
    assert "multiply-adds" not in render(collect([result.folder]))
    evaluate(result.folder, None, find_device("cpu"), trust=True, on_notice=lambda line: None)
    text = render(collect([result.folder]))
    assert "Early exits: accuracy against multiply-adds" in text
    assert "early exit, p =" in text
    (result.folder / "exits" / "anytime.csv").write_text("")
    with pytest.raises(ValueError, match="evaluate the run again"):
        collect([result.folder])
