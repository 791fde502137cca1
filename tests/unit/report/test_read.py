"""Reading the files of runs, comparisons and sweeps: half-written ones are read, damaged ones refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from rayprune.engine.storage import run_folder
from rayprune.report import read
from rayprune.report.collect import collect
from rayprune.report.page import render
from rayprune.report.read import read_comparison, read_results, read_run


def test_a_torn_last_line_is_left_out_with_a_note(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"epoch": 4, "train_lo')
    record = read_run(run)
    assert len(record.metrics) == 4
    assert any("torn" in note for note in record.notes)
    assert "torn" in render(collect([run]))


def test_a_torn_line_in_the_middle_is_refused(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"line 2 .*restore"):
        read_run(run)


@pytest.mark.parametrize("line", ["[1, 2]", "3", "null", '"text"', '{"epoch": null}', "[" * 99999])
def test_a_line_that_is_not_an_epoch_is_refused_with_its_number(run: Path, line: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 .*restore") as error:
        collect([run])
    assert "\n" not in str(error.value)


def test_missing_epochs_are_noted(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    assert "metrics.jsonl lacks 2 epochs before the last" in render(collect([run]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: shutil.rmtree(run), "there is no folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), "first epoch has not ended"),
        (lambda run: [(run / name).unlink() for name in ("metrics.jsonl", "config.yaml")], "not a run folder"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no finished epoch"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n'), "line 1 .*restore"),
        (lambda run: (run / "environment.json").write_text('{"schema": 99}'), "schema 99.*upgrade rayprune"),
        (lambda run: (run / "environment.json").write_text("{"), "not a JSON object"),
        (lambda run: (run / "environment.json").write_text('{"schema": null}'), "schema None.*restore"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "can't be read"),
        (lambda run: (run / "gallery" / "gallery.json").write_text('{"kinds": []}'), "delete its folder"),
    ],
)
def test_a_run_that_cannot_be_shown_is_refused_in_one_line(run: Path, damage: Any, message: str) -> None:
    damage(run)
    with pytest.raises(ValueError, match=message) as error:
        collect([run])
    assert "\n" not in str(error.value)


def test_the_engine_writes_the_schema_that_is_read(run: Path) -> None:
    assert json.loads((run / "environment.json").read_text())["schema"] == read.RUN_SCHEMA == run_folder.RUN_SCHEMA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report["arms"][1]["runs"].pop(), "1 runs of .* for 2 seeds"),
        (lambda report: report["arms"][1].update(accuracy=None), "arms.1.accuracy"),
        (lambda report: report["arms"][1].pop("flops"), "arms.1.flops"),
        (lambda report: report["arms"][0].update(epochs=[]), "arms.0.epochs"),
        (lambda report: report["arms"].pop(0), "full training"),
        (lambda report: report.update(verdict="yes"), "verdict"),
        (lambda report: report.clear(), "arms"),
        (lambda report: report.update(arms=[]), "arms"),
    ],
)
def test_an_incomplete_comparison_is_refused_with_the_cure(
    comparison: Path, tmp_path: Path, change: Any, message: str
) -> None:
    report = json.loads((comparison / "compare.json").read_text())
    change(report)
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=f"compare.json .*{message}.*again"):
        read_comparison(file)


def test_a_torn_comparison_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(ValueError, match=r"compare.json .*JSON.*again") as error:
        read_comparison(tmp_path / "compare.json")
    assert "\n" not in str(error.value)


def test_a_damaged_sweep_is_refused_with_the_cure(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.parquet"
    table = pd.read_parquet(sweep / "results.parquet")
    content = (sweep / "results.parquet").read_bytes()
    cure = r"results.parquet .*run the same rayprune sweep again"
    damaged = [content[:-40], content[:3000].replace(content[8:200], b"x" * 192) + content[3000:], b""]
    for bad in damaged:
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=cure):
            read_results(file)
    for changed in (
        table.drop(columns="status"),
        table.drop(columns=["flops", "error"]),
        table.assign(seconds="long"),
        table[:0],
    ):
        changed.to_parquet(file)
        with pytest.raises(ValueError, match=cure):
            read_results(file)


def test_rows_of_a_sweep_are_plain_values(sweep: Path) -> None:
    rows = read_results(sweep / "results.parquet").rows
    assert [type(rows[0][key]) for key in ("trial", "val_accuracy", "pareto")] == [str, float, bool]
    assert rows[0]["error"] is None
    assert rows[2]["val_accuracy"] is None
