"""Which runs, sweeps and comparisons a report shows, what it calls them, and what it leaves out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rayprune.report.collect import collect
from rayprune.report.page import render
from tests.support.reports import copy_of


def test_named_runs_take_the_place_of_a_comparisons_runs(comparison: Path, tmp_path: Path) -> None:
    folder = copy_of(next((comparison / "runs").glob("full-seed0")), tmp_path / "foreign")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("source: digits", "source: cifar10"))
    text = render(collect([comparison, folder]))
    lead = text.split('class="lead">')[1].split("<")[0]
    assert lead.startswith("a comparison on digits, ")
    assert "; a run of full, 2 epochs on cifar10" in lead
    assert "The run of each arm" not in text
    assert "The runs that were named. Runs of a sweep or a comparison are shown where" in text
    assert "The run of each arm with seed 0." in render(collect([comparison]))


def test_runs_of_two_comparisons_have_different_names(comparison: Path, tmp_path: Path) -> None:
    collected = collect([copy_of(comparison, tmp_path / side / "same") for side in ("a", "b")])
    names = [run.name for run in collected.runs]
    assert len(names) == len(set(names)) == 4
    assert names[0] == "a/same: full"
    assert "a/same: The run of each arm with seed 0. b/same: The run" in collected.runs_text
    assert "Comparison b/same" in render(collected)
    assert [group.name for group in collect([tmp_path / "a"]).groups] == ["same"]  # a folder of results


def test_a_comparison_is_shown_without_a_damaged_run(comparison: Path, tmp_path: Path) -> None:
    folder = copy_of(comparison, tmp_path / "compared")
    (folder / "runs" / "full-seed0" / "environment.json").write_text("{")
    collected = collect([folder])
    assert len(collected.runs) == 1
    assert any("full is not among" in note and "environment.json" in note for note in collected.groups[0].notes)


def test_an_unfinished_comparison_is_refused_but_not_its_runs(comparison: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(comparison, folder)
    (folder / "compare.json").unlink()
    with pytest.raises(ValueError, match=r"no compare.json.*rayprune report .*/runs"):
        collect([folder])
    assert len(collect([folder / "runs"]).runs) == 4


def test_a_sweep_without_an_ended_trial_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("{}")
    with pytest.raises(ValueError, match="try again when its first trial has ended"):
        collect([tmp_path])


def test_damaged_results_in_a_folder_are_left_out_with_a_note(runs: list[Path], tmp_path: Path) -> None:
    for name in ("sound", "no_line", "newer", "gallery", "unstarted"):
        copy_of(runs[1], tmp_path / name)
    (tmp_path / "no_line" / "metrics.jsonl").write_text('{"epo')
    (tmp_path / "newer" / "environment.json").write_text('{"schema": 99}')
    (tmp_path / "gallery" / "gallery" / "gallery.json").write_text('{"schema": 1, "kinds": []}')
    (tmp_path / "unstarted" / "metrics.jsonl").unlink()
    (tmp_path / "bare_comparison").mkdir()
    (tmp_path / "bare_comparison" / "compare.json").write_text("{}")
    collected = collect([tmp_path])
    assert [record.name for record in collected.runs] == ["sound"]
    damaged = ["bare_comparison", "gallery", "newer", "no_line", "unstarted"]
    assert [note.split()[0] for note in collected.omissions] == damaged
    assert all(str(tmp_path / note.split()[0]) in note for note in collected.omissions)
    assert render(collected).count(" was left out: ") == 5
    for folder in ("newer", "gallery", "no_line"):  # a folder that is named itself must be sound
        with pytest.raises(ValueError, match=folder):
            collect([tmp_path, tmp_path / folder])


def test_unreadable_runs_are_left_out_with_a_note(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden, stat, read_text = runs[1], Path.stat, Path.read_text

    def refuse(path: Path) -> None:
        if forbidden in path.parents:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", lambda path, **options: refuse(path) or read_text(path, **options))
    collected = collect([runs[1].parent])
    assert [record.folder for record in collected.runs] == [runs[0]]
    assert collected.omissions[0].startswith("pruned was left out: ")
    assert "(Permission denied): check its permissions" in collected.omissions[0]
    with pytest.raises(ValueError, match=r"pruned.*can't be read"):
        collect([runs[1]])
    monkeypatch.setattr(Path, "stat", lambda path, **options: refuse(path) or stat(path, **options))
    assert collect([runs[1].parent]).omissions == []  # somebody else's folder


def test_a_folder_of_damaged_runs_only_is_refused_in_one_line(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"nothing that can be shown.*has no finished epoch"):
        collect([run.parent])


def test_runs_in_folders_of_one_name_have_different_names(run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "same" / "run", tmp_path / "y" / "same" / "run", tmp_path / "y" / "other"]
    for folder in folders:
        shutil.copytree(run, folder)
    collected = collect([*folders, tmp_path / "y" / ".." / "y" / "other"])  # the same folder twice is one
    assert [record.name for record in collected.runs] == ["x/same/run", "y/same/run", "other"]


def test_runs_without_a_gallery_are_named_once_and_not_as_a_fault(runs: list[Path], tmp_path: Path) -> None:
    for number in range(2):
        shutil.rmtree(copy_of(runs[1], tmp_path / f"old{number}") / "gallery")
    collected = collect([tmp_path])
    assert [*collected.omissions, *collected.run_notes] == []
    assert collected.gallery_note.startswith("old0, old1: no gallery")
    assert render(collected).count("no gallery") == 1
