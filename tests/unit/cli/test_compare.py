"""`rayprune compare` as a user types it: the table, the verdict, the files, the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rayprune.cli.main import cli
from tests.support.command_line import loaded_modules, rayprune
from tests.support.paths import ROOT

CONFIG = str(ROOT / "configs" / "digits_compare.yaml")
QUICK = ["scaling.threads=1", "train.epochs=3", "data.limit=301", "compare.baselines=[full, full_steps]"]


def inside(*words: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, ["compare", *words])


def test_one_command_ends_with_a_table_and_a_verdict(tmp_path: Path) -> None:
    done = rayprune("compare", CONFIG, *QUICK, "compare.seeds=2", f"run.storage_path={tmp_path}")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("digits_compare-compare-")
    assert {"compare.json", "compare.csv", "compare.png", "compare.yaml", "runs"} <= {p.name for p in folder.iterdir()}
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "compare.json").read_text())
    table = done.stdout.partition("\narm ")[2].splitlines()[: 1 + len(report["arms"])]
    rows = {line.split()[0]: line for line in table[1:]}
    for arm in report["arms"]:
        assert f"{arm['accuracy']:.2f} ± {arm['accuracy_sd']:.2f}" in rows[arm["name"]]
        assert f"{arm['samples_trained']:,.0f}" in rows[arm["name"]]
    assert f"[{report['arms'][1]['to_full']['low']:+.2f}, " in rows["infobatch"]
    assert report["verdict"]["sentence"] in done.stdout
    again, loaded = loaded_modules(
        ["ray", "torch"], "compare", CONFIG, *QUICK, "compare.seeds=2", f"run.storage_path={tmp_path}"
    )
    assert loaded == set()
    assert again.startswith(f"{folder.name}: already finished\n")
    assert again.partition("\narm ")[2].splitlines()[:-1] == done.stdout.partition("\narm ")[2].splitlines()[:-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([CONFIG, CONFIG], "name one config"),
        ([CONFIG, "compare.baselines=[full_tim]"], "did you mean 'full_time'"),
        ([CONFIG, "method.name=full"], "method is full, the baseline of all methods"),
        ([CONFIG, "compare.seeds=0"], "at least one seed"),
        ([CONFIG, "train.stop_after=2"], "train.stop_after"),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_anything_runs(tmp_path: Path, words: list[str], line: str) -> None:
    done = inside(*words, f"run.storage_path={tmp_path / 'runs'}")
    assert isinstance(done.exception, ValueError)
    assert line in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "runs").exists()


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    done = inside(CONFIG, *QUICK, "compare.seeds=1", f"run.storage_path={tmp_path}")
    assert done.exception is None, done.output
    (folder,) = tmp_path.iterdir()
    assert "no interval" in json.loads((folder / "compare.json").read_text())["verdict"]["sentence"]
    assert (folder / "compare.png").exists()
