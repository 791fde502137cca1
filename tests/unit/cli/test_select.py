"""`rayprune select` as a user types it: what it writes, what it prints, and how it refuses.

Shapes: N samples.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from rayprune.cli import main as cli
from rayprune.cli.select import select
from rayprune.core.choosing import choose
from rayprune.sources.tables.audits import AuditTable, write_audit
from rayprune.sources.tables.scores import write_scores
from rayprune.sources.tables.selections import read_selection_file
from tests.support.paths import ROOT

LABELS = np.arange(40) % 4
LOSS = np.random.default_rng(0).gamma(1.0, size=40).astype(np.float32)


def scores_in(folder: Path, loss: Any = LOSS, **more: Any) -> Path:
    scores = {"loss": loss, **more}
    visits = np.zeros(40, dtype=np.int32)
    return write_scores(folder / "scores.parquet", 40, scores, labels=LABELS, last_visit=visits, fingerprint="ab")


def run(*words: object) -> str:
    """Run the command in this process; return what it printed."""
    done = CliRunner().invoke(select, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the whole command line in this process; return its one line on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rayprune", "select", *map(str, words)])
        patch.setattr(sys, "path", sys.path.copy())
        with pytest.raises(SystemExit) as exit_:
            cli.main()
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_the_highest_scores_are_kept_and_the_next_command_is_printed(tmp_path: Path) -> None:
    scores_in(tmp_path)
    printed = run(tmp_path, "--keep", "0.3")
    stored = read_selection_file(tmp_path / "chosen.parquet", 40)
    assert stored.ids.tolist() == choose(LOSS, 12).ids.tolist()
    assert set(stored.weights) == {1.0}
    assert stored.fingerprint == "ab"
    assert {"by": "loss", "keep": 0.3, "rule": "top", "scores": "scores.parquet"}.items() <= stored.about.items()
    assert "12 of 40 (30.0%)" in printed
    assert f"kept {np.sort(LOSS)[-12]:.4g} to {LOSS.max():.4g}, all {LOSS.min():.4g} to" in printed
    assert f"rayprune train CONFIG method.name=fixed method.path={tmp_path}/chosen.parquet" in printed
    rows = re.findall(r"^ +(\d) +(\d+) +10 +(\S+)% ", printed, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == [0, 1, 2, 3]
    assert sum(int(kept) for _, kept, _ in rows) == 12


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--rule", "bottom"], {"rule": "bottom"}),
        (["--rule", "middle", "--balance", "even"], {"rule": "middle", "balance": "even"}),
        (["--per-class"], {"balance": "proportional"}),
        (["--drop-top", "0.1", "--drop-bottom", "0.2"], {"drop_top": 0.1, "drop_bottom": 0.2}),
        (["--rule", "strata", "--strata", "4", "--reweigh"], {"rule": "strata", "num_strata": 4, "reweigh": True}),
    ],
)
def test_options_reach_the_selection(tmp_path: Path, words: list[str], options: dict[str, Any]) -> None:
    scores = scores_in(tmp_path)
    run(scores, "--keep", "12", "--seed", "5", *words)
    expected = choose(LOSS, 12, labels=LABELS, rng=np.random.default_rng([5, 0]), **options)
    stored = read_selection_file(tmp_path / "chosen.parquet")
    assert stored.ids.tolist() == expected.ids.tolist()
    assert np.array_equal(stored.weights, expected.weights)


def test_several_formats_hold_the_same_selection(tmp_path: Path) -> None:
    scores_in(tmp_path)
    files = [tmp_path / f"seven{ending}" for ending in (".parquet", ".txt")]
    printed = run(tmp_path, "--keep", "7", *(word for file in files for word in ("--out", file)))
    ids = [read_selection_file(file).ids.tolist() for file in files]
    assert ids == [ids[0]] * 2
    assert all(f"wrote    {file}" in printed for file in files)
    assert not (tmp_path / "chosen.parquet").exists()


def test_an_existing_file_is_overwritten_only_with_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = scores_in(tmp_path)
    run(tmp_path, "--keep", "7")
    new = tmp_path / "new.txt"
    assert "--force" in refused(capsys, tmp_path, "--keep", 9, "--out", new, "--out", tmp_path / "chosen.parquet")
    assert not new.exists()
    run(tmp_path, "--keep", "9", "--force")
    assert read_selection_file(tmp_path / "chosen.parquet").ids.size == 9
    before = scores.read_bytes()
    assert "holds the scores" in refused(capsys, scores, "--keep", 9, "--out", scores, "--force")
    assert scores.read_bytes() == before


def test_samples_without_a_score_are_refused_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = LOSS.copy()
    loss[[3, 30, 31]] = np.nan
    scores_in(tmp_path, loss)
    assert "3 of 40 samples have no loss, first ids [3, 30, 31]" in refused(capsys, tmp_path, "--keep", 0.5)
    assert "37 have a loss" in refused(capsys, tmp_path, "--keep", 38, "--drop-missing")
    printed = run(tmp_path, "--keep", "0.5", "--drop-missing", "--rule", "bottom", "--per-class")
    assert "3 left out without a loss" in printed
    stored = read_selection_file(tmp_path / "chosen.parquet")
    assert stored.ids.size == 20
    assert not {3, 30, 31} & set(stored.ids)
    assert np.isfinite(loss[stored.ids]).all()


def test_a_csv_without_labels_and_many_classes(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("id,score\n" + "".join(f"{number},{number % 7}\n" for number in range(20)))
    assert "class" not in run(file, "--keep", "4", "--out", tmp_path / "chosen.txt")
    assert read_selection_file(tmp_path / "chosen.txt").ids.tolist() == [5, 6, 12, 13]
    write_scores(tmp_path / "many.parquet", 40, {"loss": LOSS}, labels=np.arange(40) // 2)
    printed = run(tmp_path / "many.parquet", "--keep", "10")
    assert re.search(r"classes  20: from 0.0% of class \d+ to (50|100)\.0% of class \d+", printed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "outside 1..40"),
        (["--keep", "41"], "outside 1..40"),
        (["--keep", "1.5"], "outside (0, 1]"),
        (["--keep", "half"], "'half' is not a number"),
        (["--keep", "nan"], "outside (0, 1]"),
        ([], "'--keep'"),
        (["--keep", "5", "--rule", "highest"], "'highest' is not one of"),
        (["--keep", "5", "--by", "los"], "did you mean 'loss'"),
        (["--keep", "5", "--strata", "0"], "'--strata'"),
        (["--keep", "5", "--seed", "-1"], "'--seed'"),
        (["--keep", "5", "--drop-top", "1"], "'--drop-top'"),
        (["--keep", "40", "--drop-top", "0.5"], "outside 1..20"),
        (["--keep", "5", "--reweigh"], "rule 'strata'"),
        (["--keep", "5", "--rule", "strata", "--reweigh"], "use fewer strata"),
        (["--keep", "5", "--out", "chosen.npz"], "end it in .parquet or .txt"),
        (["--keep", "5", "--out", "nowhere/chosen.txt"], "create it first"),
    ],
)
def test_a_mistake_is_refused_in_one_line_and_nothing_is_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    scores_in(tmp_path)
    assert message in refused(capsys, "scores.parquet", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_unusable_scores_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refused(capsys, tmp_path / "none.parquet", "--keep", 5)
    assert "let the run finish" in refused(capsys, tmp_path, "--keep", 5)
    scores_in(tmp_path, el2n=LOSS)
    assert "2 scores: name the one to use, one of loss, el2n" in refused(capsys, tmp_path, "--keep", 5)
    run(tmp_path, "--keep", 5, "--by", "el2n")
    assert "is a selection" in refused(capsys, tmp_path / "chosen.parquet", "--keep", 5, "--force")
    write_scores(tmp_path / "bare.parquet", 40, {"loss": LOSS})
    assert "no column 'label'" in refused(capsys, tmp_path / "bare.parquet", "--keep", 5, "--per-class", "--force")


def test_selecting_loads_neither_ray_nor_torch(tmp_path: Path) -> None:
    scores_in(tmp_path)
    code = f"import sys; sys.argv = ['rayprune', 'select', {str(tmp_path)!r}, '--keep', '5']; " + (
        "from rayprune.cli.main import cli; cli.main(standalone_mode=False); "
        "print('LOADED', sorted({'ray', 'torch'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert "LOADED []" in done.stdout, done.stderr
    assert (tmp_path / "chosen.parquet").exists()


def audit_in(folder: Path) -> Path:
    """An audit of 40 samples: those below 10 are suspects, from 0.5 to 0.95, and 20 to 23 show the same."""
    p_wrong = np.where(np.arange(40) < 10, 0.5 + 0.05 * np.arange(40), 0.1)
    of, split = np.full(40, -1), np.full(40, "", dtype=object)
    of[21:24], split[21:24] = 20, "train"
    table = AuditTable(LABELS, p_wrong, duplicate_of=of, duplicate_split=split)
    return write_audit(folder, table, "ab")


@pytest.mark.parametrize("by_folder", [True, False])
def test_suspects_are_dropped_by_an_audit(tmp_path: Path, by_folder: bool) -> None:
    file = audit_in(tmp_path)
    printed = run(tmp_path if by_folder else file, "--drop-suspects")
    stored = read_selection_file(tmp_path / "chosen.parquet", 40)
    assert stored.ids.tolist() == list(range(10, 40))
    assert (stored.fingerprint, stored.about["at"]) == ("ab", 0.5)
    assert "kept     30 of 40 (75.0%)" in printed
    assert "dropped  10: 10 with p_wrong of at least 0.5\n" in printed
    rows = re.findall(r"^ +(\d) +(\d+) +10 +(\S+)%$", printed, flags=re.MULTILINE)
    assert rows == [("0", "3", "30.0"), ("1", "3", "30.0"), ("2", "2", "20.0"), ("3", "2", "20.0")]
    assert f"rayprune train CONFIG method.name=fixed method.path={tmp_path}/chosen.parquet" in printed


def test_duplicates_are_dropped_by_an_audit(tmp_path: Path) -> None:
    audit_in(tmp_path)
    out = tmp_path / "new.txt"
    printed = run(tmp_path, "--drop-suspects", "--at", "0.9", "--drop-duplicates", "--out", out)
    assert read_selection_file(out).ids.tolist() == [*range(8), *range(10, 21), *range(24, 40)]
    assert "dropped  5: 2 with p_wrong of at least 0.9, 3 duplicates of kept samples" in printed
    run(tmp_path, "--drop-duplicates", "--out", out, "--force")
    assert read_selection_file(out).ids.tolist() == [*range(21), *range(24, 40)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop-suspects", "--keep", "0.5"], "--drop-suspects chooses by the audit, and --keep by scores"),
        (["--drop-suspects", "--rule", "top"], "--drop-suspects chooses by the audit, and --rule by scores"),
        (["--drop-duplicates", "--per-class"], "--drop-duplicates chooses by the audit, and --balance by scores"),
        (["--drop-duplicates", "--at", "0.6"], "--at goes with --drop-suspects"),
        (["--keep", "0.5", "--at", "0.6"], "--at goes with --drop-suspects"),
        (["--drop-suspects", "--at", "1.5"], "--at"),
        ([], "Missing option '--keep'"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    audit_in(tmp_path)
    assert message in refused(capsys, tmp_path, *words)
    assert not (tmp_path / "chosen.parquet").exists()


def test_an_audit_that_would_leave_nothing_or_is_missing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist: rayprune audit CONFIG writes it" in refused(capsys, tmp_path, "--drop-suspects")
    file = audit_in(tmp_path)
    assert "drops every sample" in refused(capsys, tmp_path, "--drop-suspects", "--at", "0.01")
    assert "holds the audit" in refused(capsys, file, "--drop-suspects", "--out", file, "--force")
