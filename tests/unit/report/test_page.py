"""The report and `rayprune show`, on run folders of tiny real runs: whole, escaped, and of what is half written."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from rayprune.cli.main import cli
from rayprune.engine.storage import run_folder
from rayprune.engine.train.driver import train
from rayprune.report import read as reading
from rayprune.report.collect import collect
from rayprune.report.page import render, write_pngs
from rayprune.report.read import read_run
from rayprune.report.tables import samples_table
from tests.support.runs import run_config

NASTY = '<img src=x onerror="alert(1)">&$x$'


class _Page(HTMLParser):
    """The tags of a page, its texts, and what it would load."""

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    storage = tmp_path_factory.mktemp("runs")
    methods = {"full": {"name": "full"}, "pruned": {"name": "infobatch", "prune_ratio": 0.5}}
    return [train(run_config(storage, name, method=method)).folder for name, method in methods.items()]


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(runs[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))


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
    for heading in ("Loss by samples trained", "Accuracy by seconds", "Where the seconds went", "Kept of each class"):
        assert heading in text


def test_names_with_html_are_escaped(runs: list[Path], tmp_path: Path) -> None:
    folders = [tmp_path / NASTY, tmp_path / "other"]
    for folder in folders:
        shutil.copytree(runs[1], folder, ignore=shutil.ignore_patterns("checkpoints"))
    text = render(collect(folders))
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert "x" not in _Page(text).loads


def test_a_torn_last_line_is_left_out_and_told(run: Path) -> None:
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


def test_a_running_run_is_shown_as_far_as_it_is(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    (run / "scores.parquet").unlink()
    text = render(collect([run]))
    assert "1 of 4 epochs so far" in text
    assert "no scores yet" in text
    shown = CliRunner().invoke(cli, ["show", str(run)], catch_exceptions=False)
    assert "1 of 4 epochs so far" in shown.output


def test_a_run_without_validation_is_drawn(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{**line, "val_loss": None, "val_accuracy": None, "train_loss": None} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert "–" in render(collect([run]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda run: shutil.rmtree(run), "there is no folder"),
        (lambda run: (run / "metrics.jsonl").unlink(), "first epoch has not ended"),
        (lambda run: [(run / name).unlink() for name in ("metrics.jsonl", "config.yaml")], "no run folder"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no finished epoch"),
        (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n'), "line 1 .*restore"),
        (lambda run: (run / "environment.json").write_text('{"schema": 99}'), "schema 99.*upgrade rayprune"),
        (lambda run: (run / "environment.json").write_text("{"), "no JSON"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "can't be read"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_line(run: Path, damage: object, told: str) -> None:
    damage(run)  # type: ignore[operator]
    with pytest.raises(ValueError, match=told) as error:
        collect([run])
    assert "\n" not in str(error.value)


def _change(file: Path, **values: object) -> None:
    """Lay values over every line of a metrics.jsonl."""
    lines = [json.loads(line) | values for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


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
        {"score_quantiles": {"loss": [None] * 7, "other": "?"}},
        {"val_accuracy": [1], "train_loss": True, "val_loss": float("inf"), "world_size": -1},
        {"val_accuracy": float("inf"), "pruned_fraction": -float("inf"), "wall_time": float("inf")},
    ],
)
def test_odd_values_of_an_epoch_are_shown_as_missing(run: Path, values: dict[str, object]) -> None:
    _change(run / "metrics.jsonl", **values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = render(collect([run]))
    assert ">None<" not in text
    assert ">nan" not in text
    assert re.search(r">-?inf[%<]", text) is None
    assert CliRunner().invoke(cli, ["show", str(run)], catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize("line", ["[1, 2]", "3", "null", '"text"', '{"epoch": null}', "[" * 99999])
def test_a_line_that_is_no_epoch_is_refused_by_its_number(run: Path, line: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 .*restore") as error:
        collect([run])
    assert "\n" not in str(error.value)


def test_epochs_that_are_missing_are_told(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], *lines[3:]]) + "\n")
    assert "metrics.jsonl has no line of 2 epochs before the last" in render(collect([run]))


def test_a_method_within_a_method_is_listed_without_what_is_unset(run: Path) -> None:
    inner = "{name: infobatch, prune_ratio: 0.5, target_saving: null, quantiles: []}"
    (run / "config.yaml").write_text(f"method: {{name: shuffled, of: {inner}}}\ntrain: {{epochs: 4}}\n")
    assert "shuffled (of (name infobatch, prune_ratio 0.5))" in render(collect([run]))


def test_odd_settings_and_versions_are_shown_as_missing(run: Path) -> None:
    (run / "environment.json").write_text('{"schema": 1, "versions": null, "gpu": [1]}')
    (run / "config.yaml").write_text("method: infobatch\ntrain: {epochs: many, stop_after: true}\ndata: null\n")
    assert "4 epochs" in render(collect([run]))
    (run / "environment.json").write_text('{"schema": null}')
    with pytest.raises(ValueError, match=r"environment.json is of no schema \(None\).*restore"):
        collect([run])


def test_one_epoch_is_one(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    (run / "config.yaml").write_text("train: {epochs: 1}\n")
    text = render(collect([run]))
    assert "1 epoch on" in text
    assert "1 epochs" not in text


def test_of_a_folder_of_runs_what_is_damaged_is_left_out_and_told(runs: list[Path], tmp_path: Path) -> None:
    for name in ("sound", "no_line", "newer", "gallery", "unstarted"):
        shutil.copytree(runs[1], tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "no_line" / "metrics.jsonl").write_text('{"epo')
    (tmp_path / "newer" / "environment.json").write_text('{"schema": 99}')
    (tmp_path / "gallery" / "gallery" / "gallery.json").write_text('{"schema": 1, "kinds": []}')
    (tmp_path / "unstarted" / "metrics.jsonl").unlink()
    (tmp_path / "old_comparison").mkdir()
    (tmp_path / "old_comparison" / "compare.json").write_text("{}")
    found = collect([tmp_path])
    assert [record.name for record in found.runs] == ["sound"]
    assert [note.split()[0] for note in found.left_out] == [
        "old_comparison",
        "gallery",
        "newer",
        "no_line",
        "unstarted",
    ]
    assert all(str(tmp_path / note.split()[0]) in note for note in found.left_out)
    done = CliRunner().invoke(cli, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.output.count(" was left out: ") == 5
    assert (tmp_path / "report.html").read_text().count(" was left out: ") == 5
    # Named itself, it is what was asked for.
    for folder in ("newer", "gallery", "no_line"):
        with pytest.raises(ValueError, match=folder):
            collect([tmp_path, tmp_path / folder])


def test_what_may_not_be_read_is_left_out_and_told(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden, look, read = runs[1], Path.stat, Path.read_text

    def refuse(wanted: Path) -> None:
        if forbidden in wanted.parents:
            raise PermissionError(13, "Permission denied", str(wanted))

    monkeypatch.setattr(Path, "read_text", lambda path, **options: refuse(path) or read(path, **options))
    found = collect([runs[1].parent])
    assert [record.folder for record in found.runs] == [runs[0]]
    assert found.left_out[0].startswith("pruned was left out: ")
    assert "(Permission denied): allow it" in found.left_out[0]
    with pytest.raises(ValueError, match=r"pruned.*can't be read"):
        collect([runs[1]])
    monkeypatch.setattr(Path, "stat", lambda path, **options: refuse(path) or look(path, **options))
    assert collect([runs[1].parent]).left_out == []  # a folder of others


def test_a_folder_of_damaged_runs_alone_is_one_line(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"nothing that can be shown.*holds no finished epoch"):
        collect([run.parent])


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "same" / "run", tmp_path / "y" / "same" / "run", tmp_path / "y" / "other"]
    for folder in folders:
        shutil.copytree(run, folder)
    found = collect([*folders, tmp_path / "y" / ".." / "y" / "other"])  # the same folder twice is one
    assert [record.name for record in found.runs] == ["x/same/run", "y/same/run", "other"]


def test_runs_without_a_gallery_are_told_once_and_not_as_a_fault(runs: list[Path], tmp_path: Path) -> None:
    for number in range(2):
        shutil.copytree(runs[1], tmp_path / f"old{number}", ignore=shutil.ignore_patterns("checkpoints", "gallery"))
    found = collect([tmp_path])
    assert found.notes == []
    assert found.gallery_note.startswith("old0, old1: no gallery")
    done = CliRunner().invoke(cli, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.output.count("no gallery") == (tmp_path / "report.html").read_text().count("no gallery") == 1


def test_names_in_any_script_warn_of_no_glyphs(run: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(run, tmp_path / name)) for name in ("跑一次", "🚀 नमस्ते")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "跑一次" in render(collect(folders))
        write_pngs(collect(folders), tmp_path / "png")


def test_the_engine_writes_the_schema_that_is_read(run: Path) -> None:
    assert json.loads((run / "environment.json").read_text())["schema"] == reading.RUN_SCHEMA == run_folder.RUN_SCHEMA


def test_show_prints_the_samples_of_highest_score(runs: list[Path]) -> None:
    scores = pd.read_parquet(runs[1] / "scores.parquet")
    hardest = scores.sort_values("loss", ascending=False, kind="stable")["id"].head(7).tolist()
    assert [int(row[0]) for row in samples_table(read_run(runs[1]), "loss", 7).rows] == hardest
    words = ["show", str(runs[1]), "--sort", "loss", "--top", "7"]
    shown = CliRunner().invoke(cli, words, catch_exceptions=False)
    lines = shown.output.split("times_pruned\n")[1].splitlines()
    assert [int(line.split()[0]) for line in lines] == hardest


def test_an_unknown_score_is_refused_with_the_closest(runs: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"no column 'los'.*loss"):
        samples_table(read_run(runs[1]), "los")


def test_report_writes_next_to_the_runs_and_pngs_where_asked(runs: list[Path], tmp_path: Path) -> None:
    storage = runs[0].parent
    done = CliRunner().invoke(cli, ["report", *map(str, runs)], catch_exceptions=False)
    assert done.output.splitlines()[-1] == f"report: {storage / 'report.html'}"
    whole = (storage / "report.html").read_text()
    (storage / "report.html").unlink()
    assert CliRunner().invoke(cli, ["report", str(storage)]).exit_code == 0  # a folder of runs
    assert len((storage / "report.html").read_text()) == pytest.approx(len(whole), rel=0.05)
    written = write_pngs(collect(runs), tmp_path / "png")
    assert len(written) >= 11
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


def test_a_place_that_cannot_be_written_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for words, told in (
        (["--output", f"{tmp_path}/file/page.html"], "name another place"),
        (["--png", f"{tmp_path}/file"], "name another place"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--output", f"{tmp_path}/pipe"], "is no regular file"),
        (["--output", "a.html", "--png", "b"], "leave --output out"),
    ):
        done = CliRunner().invoke(cli, ["report", str(runs[0]), *words])
        assert isinstance(done.exception, ValueError)
        assert told in str(done.exception)
