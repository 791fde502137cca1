"""`rayprune report` and `rayprune show`: what they write and print, and how they refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from rayprune.cli.main import cli
from tests.support.reports import copy_of, two_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return two_runs(tmp_path_factory.mktemp("runs"))


def run(*words: object) -> str:
    """Run a command in this process; return what it printed."""
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def assert_refused(done: Result, message: str) -> None:
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)
    assert "\n" not in str(done.exception)


def test_the_page_is_written_next_to_the_runs(runs: list[Path]) -> None:
    storage = runs[0].parent
    printed = run("report", *runs)
    assert printed.splitlines()[-1] == f"report: {storage / 'report.html'}"
    page = (storage / "report.html").read_text()
    (storage / "report.html").unlink()
    run("report", storage)  # a folder of runs
    assert len((storage / "report.html").read_text()) == pytest.approx(len(page), rel=0.05)


def test_plots_alone_are_written_as_png_files(runs: list[Path], tmp_path: Path) -> None:
    printed = run("report", *runs, "--png", tmp_path / "png")
    files = sorted((tmp_path / "png").iterdir())
    assert sorted(printed.splitlines()) == [str(file) for file in files]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_notes_are_printed_and_on_the_page(runs: list[Path], tmp_path: Path) -> None:
    for name in ("sound", "damaged"):
        copy_of(runs[1], tmp_path / name)
    (tmp_path / "damaged" / "metrics.jsonl").write_text('{"epo')
    (tmp_path / "sound" / "scores.parquet").unlink()
    printed = run("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    for text in (printed, page):
        assert text.count("damaged was left out: ") == 1
        assert text.count("scores.parquet is missing") == 1


def test_a_missing_gallery_is_mentioned_once(runs: list[Path], tmp_path: Path) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    (folder / "gallery").rename(tmp_path / "elsewhere")
    printed = run("report", folder)
    assert printed.count("no gallery") == (folder / "report.html").read_text().count("no gallery") == 1


def test_an_output_that_cannot_be_written_is_refused_in_one_line(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for words, message in (
        (["--output", f"{tmp_path}/file/page.html"], "name another place"),
        (["--png", f"{tmp_path}/file"], "name another place"),
        (["--output", str(tmp_path)], "is a folder"),
        (["--output", f"{tmp_path}/pipe"], "is not a regular file"),
        (["--output", "a.html", "--png", "b"], "leave --output out"),
    ):
        assert_refused(CliRunner().invoke(cli, ["report", str(runs[0]), *words]), message)


@pytest.mark.parametrize("content", ["{", "{}", '{"arms": []}'])
def test_a_damaged_comparison_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "compare.json").write_text(content)
    assert_refused(CliRunner().invoke(cli, ["report", str(tmp_path)]), "again")


def test_show_prints_settings_epochs_and_samples_by_score(runs: list[Path]) -> None:
    scores = pd.read_parquet(runs[1] / "scores.parquet")
    hardest = scores.sort_values("loss", ascending=False, kind="stable")["id"].head(7).tolist()
    printed = run("show", runs[1], "--sort", "loss", "--top", "7")
    lines = printed.split("times_pruned\n")[1].splitlines()
    assert [int(line.split()[0]) for line in lines] == hardest
    assert "infobatch (" in printed
    assert "epoch  requested  pruned" in printed


def test_show_prints_a_running_run_and_odd_values(runs: list[Path], tmp_path: Path) -> None:
    folder = copy_of(runs[1], tmp_path / "run")
    line = (folder / "metrics.jsonl").read_text().splitlines()[0]
    (folder / "metrics.jsonl").write_text(line.replace('"seconds": {', '"seconds": "none", "other": {') + "\n")
    (folder / "scores.parquet").unlink()
    (folder / "gallery" / "gallery.json").write_text("{")  # not shown here
    printed = run("show", folder)
    assert "1 of 4 epochs so far" in printed
    assert printed.rstrip().endswith("–")
