"""`rayprune audit`: what it prints and writes, the page of its folder, and how it refuses."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rayprune.cli import main as command_line
from rayprune.cli.main import cli
from rayprune.report.audit import WEAK, read_audit_section
from rayprune.sources.tables.audits import read_audit
from rayprune.sources.tables.selections import read_selection_file
from tests.support.audits import audit_config, noisy_digits
from tests.support.runs import run_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    config = audit_config(noisy_digits(folder).path, folder, train={"epochs": 5}, audit={"folds": 2, "window": 1})
    (folder / "noisy.yaml").write_text(config.to_yaml())
    return folder / "noisy.yaml"


def run(*words: object) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def printed(config: Path) -> str:
    return run("audit", config)


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """Run the whole command line in this process; return its one line on stderr."""
    monkeypatch.setattr(sys, "argv", ["rayprune", "audit", *map(str, words)])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `main` installs its handler for the rest of the process
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    printed = capsys.readouterr()
    assert exit_.value.code == 2
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_the_findings_are_printed(config: Path, printed: str) -> None:
    folder = config.parent / "audit"
    summary, table = json.loads((folder / "audit.json").read_text()), read_audit(folder).table
    assert f"{summary['noise_rate']:.1%} of 604 labels are wrong, by estimate" in printed
    assert f"{summary['accuracy']:.1%} of the labels are predicted by networks that did not train on" in printed
    assert summary["conflicts"] > 0
    assert f"\n{summary['conflicts']} of the near-duplicates have another label than" in printed
    assert WEAK not in " ".join(printed.split())
    pair = next(pair for pair in summary["pairs"] if pair["count"])
    line = rf"^{pair['label']} +{pair['suggested']} +{pair['count']} +{pair['rate']:.1%}$"
    assert re.search(line, printed, re.MULTILINE)
    for name, text in (("wrong_label", "labels that are probably wrong"), ("leak", "near-duplicates of validation")):
        assert re.search(rf"^ *{(table.group == name).sum()}  {text}", printed, re.MULTILINE)
    assert printed.splitlines()[-1].endswith(f": {folder}")


def test_networks_that_have_learned_nothing_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {f"{name}_{part}": values for part in ("train", "test") for name, values in random_table(rng).items()}
    np.savez(tmp_path / "random.npz", **parts)
    data = {"source": "arrays", "path": str(tmp_path / "random.npz"), "limit": None}
    config = run_config(tmp_path, "audit", data=data, train={"epochs": 2}, audit={"folds": 2, "duplicates": False})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert WEAK in " ".join(run("audit", str(file)).split())
    section = read_audit_section(tmp_path / "audit")
    assert section is not None
    assert WEAK in section.verdict


def random_table(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"x": rng.normal(size=(200, 4)).astype(np.float32), "y": rng.integers(0, 4, 200)}


def test_the_commands_that_it_names_run(config: Path, printed: str) -> None:
    commands = {line[:14].strip(): line[14:].split() for line in printed.splitlines() if " rayprune " in line}
    assert list(commands) == ["look at them", "leave them out", "correct them"]
    table = read_audit(config.parent / "audit").table
    run(*commands["look at them"][1:])
    page = (config.parent / "audit" / "report.html").read_text()
    assert "<h2>Data audit</h2>" in page
    assert page.count("data:image/png") > 20
    run(*commands["leave them out"][1:])
    chosen = read_selection_file(config.parent / "audit" / "chosen.parquet")
    assert chosen.ids.tolist() == (table.p_wrong < 0.5).nonzero()[0].tolist()
    short = ["train.epochs=1", "run.name=corrected"]
    trained = run(*(str(config) if word == "CONFIG" else word for word in commands["correct them"][1:]), *short)
    assert "corrected" in trained


def test_the_same_command_trains_nothing_and_prints_the_same_findings(config: Path, printed: str) -> None:
    again = run("audit", config)
    assert not re.search(r"^ *\d/5 ", again, re.MULTILINE)
    assert re.search(r"^ *\d/5 ", printed, re.MULTILINE)
    findings = "labels are wrong, by estimate"
    assert (
        again.partition(findings)[2].partition("done in")[0] == printed.partition(findings)[2].partition("done in")[0]
    )


def test_without_a_name_the_folder_is_named_after_the_config(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(config.read_text().replace("name: audit", "name: null"))
    words = ["train.epochs=1", "audit.duplicates=false", f"run.storage_path={tmp_path}"]
    printed = run("audit", file, *words)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert re.fullmatch(r"mine-audit-[0-9a-f]{8}", folder.name)
    assert str(folder) in printed
    assert run("audit", file, *words).splitlines()[-1].endswith(str(folder))
    run("audit", file, *words, "audit.at=0.9")
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1  # nothing is trained again
    run("audit", file, *words, "audit.folds=3")
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audit.train.epoch=3"], "unknown key 'audit.train.epoch': did you mean 'epochs'"),
        (["audit.optim.ler=3"], "unknown key 'audit.optim.ler'"),
        (["audit.fold=3"], "did you mean 'folds'"),
        (["audit.rule=ensembel"], "audit.rule"),
        (["audit.folds=0"], "audit.folds"),
        (["audit.at=1"], "audit.at"),
        (["audit.folds=700"], "audit.folds = 700: there are 604 samples, use fewer folds"),
        (["audit.folds=3"], "holds another audit"),
    ],
)
def test_mistakes_are_one_line(
    config: Path,
    printed: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    assert message in refused(capsys, monkeypatch, config, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audit.folds=3"], "name one config"),
        (["digits_full", "digits_infobatch"], "name one config: rayprune audit digits_full"),
        (["nope.yaml"], "nope.yaml"),
        (["digits_audit", "data.path=nowhere.npz"], "nowhere.npz"),
    ],
)
def test_a_config_is_needed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, monkeypatch, *words)
    assert list(tmp_path.iterdir()) == []
