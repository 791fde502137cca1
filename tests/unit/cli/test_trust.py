"""Commands on a run folder of someone else's: its code runs only with --trust, and its files are never unpickled."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from rayprune.cli.main import cli
from rayprune.config.code import code_digest
from rayprune.engine.storage.checkpoint import load_tensors
from rayprune.engine.storage.run_folder import read_selection
from rayprune.engine.train.driver import train
from rayprune.experiments.early_exit.evaluate import evaluate, find_device
from rayprune.sources import open_data
from rayprune.sources.tables.audits import read_audit
from rayprune.sources.tables.scores import read_scores
from rayprune.sources.tables.selections import read_selection_file
from tests.support.foreign_folder import code_with_a_mark
from tests.support.runs import run_config


def run_command(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [*map(str, words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a built-in method."""
    return train(run_config(tmp_path_factory.mktemp("runs"), train={"epochs": 1})).folder


def foreign(finished: Path, folder: Path) -> tuple[Path, str]:
    """Copy a run, and let its config name code; return its folder, and the reference."""
    run, reference = folder / "run", code_with_a_mark(folder / "code")
    for file in finished.rglob("*"):
        target = run / file.relative_to(finished)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            target.write_bytes(file.read_bytes())
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["method"] |= {"name": reference}
    config["run"] |= {"storage_path": str(folder)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run, reference


@pytest.mark.parametrize("command", [("evaluate",), ("audit",), ("audit", "audit.at=0.6"), ("report",), ("show",)])
def test_no_command_runs_the_code_of_a_run_folder(finished: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    run, reference = foreign(finished, tmp_path)
    done = run_command(command[0], run, *command[1:])
    if command[0] in {"evaluate", "audit"}:
        assert f"config.yaml names code, method.name = {reference} (digest " in str(done.exception)
        assert str(done.exception).endswith("): read it, then add --trust")
    assert not (tmp_path / "code" / "executed").exists()


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_trust_runs_it_and_a_digest_only_the_code_that_was_read(finished: Path, tmp_path: Path, command: str) -> None:
    run, reference = foreign(finished, tmp_path)
    digest = code_digest({"method.name": reference})
    refused = run_command(command, run, "--trust", "0" * 32)
    assert f"(digest {digest}, not {'0' * 32}): read it, then add --trust" in str(refused.exception)
    assert "not a digest of 32 hexadecimal digits: put --trust last" in run_command(command, "--trust", run).output
    assert not (tmp_path / "code" / "executed").exists()
    trusted = run_command(command, run, "--trust", digest)  # the checkpoints are of another method
    assert "names code" not in str(trusted.exception)
    assert (tmp_path / "code" / "executed").exists()


def test_the_functions_take_trust_too(finished: Path, tmp_path: Path) -> None:
    run, _ = foreign(finished, tmp_path)
    for trust in (False, "0" * 32):
        with pytest.raises(ValueError, match="names code, method"):
            evaluate(run, None, find_device("cpu"), trust=trust, on_notice=print)
    assert not (tmp_path / "code" / "executed").exists()


@pytest.mark.parametrize("key", ["run.resume", "run.storage_path"])
def test_a_folder_to_continue_runs_only_the_code_of_the_users_config(finished: Path, tmp_path: Path, key: str) -> None:
    run, reference = foreign(finished, tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text(run_config(tmp_path / "own", train={"epochs": 1}).to_yaml())
    change = f"run.resume={run}" if key == "run.resume" else f"run.storage_path={tmp_path}"
    done = run_command("train", own, change)
    if key == "run.storage_path":
        assert f"holds another run (method.name {reference!r} → 'infobatch'" in str(done.exception)
    else:  # its checkpoints are of the user's config
        assert done.exception is None
    assert not (tmp_path / "code" / "executed").exists()


def test_the_same_command_continues_a_run_of_ones_own_code(tmp_path: Path) -> None:
    own, reference = tmp_path / "own.yaml", code_with_a_mark(tmp_path / "code")
    own.write_text(run_config(tmp_path, method={"name": reference}, train={"epochs": 2}).to_yaml())
    for change in ("train.stop_after=1", "train.stop_after=2"):
        assert run_command("train", own, change).exception is None
    assert "already finished" in run_command("train", own).output
    audit = run_command("audit", tmp_path / "run", f"method.name={reference}", "audit.duplicates=false")
    assert audit.exception is None


class _Mark:
    """An object whose pickle makes a folder where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def _npz(file: Path, mark: _Mark) -> None:
    np.savez(file, header=np.array([mark], dtype=object), bitmap=np.array([mark], dtype=object))


def _read_npz(file: Path) -> Any:
    (file.parent / "selections").mkdir()
    return read_selection(file.parent, 0) if file.rename(file.parent / "selections/epoch-000000.npz") else None


# File → how its pickle is written, and what reads it.
_PICKLES: dict[str, tuple[Callable[[Path, Any], Any], Callable[[Path], Any]]] = {
    "model.pt": (lambda file, mark: torch.save({"a": mark}, file), lambda file: load_tensors(file, find_device("cpu"))),
    "selection.npz": (_npz, _read_npz),
    "data.npz": (_npz, lambda file: open_data("arrays", path=str(file))),
    "scores.parquet": (lambda file, mark: file.write_bytes(pickle.dumps(mark)), read_scores),
    "scores.csv": (lambda file, mark: file.write_bytes(pickle.dumps(mark)), read_scores),
    "chosen.parquet": (lambda file, mark: file.write_bytes(pickle.dumps(mark)), read_selection_file),
    "chosen.txt": (lambda file, mark: file.write_bytes(pickle.dumps(mark)), read_selection_file),
    "audit.parquet": (lambda file, mark: file.write_bytes(pickle.dumps(mark)), read_audit),
}


@pytest.mark.parametrize("name", _PICKLES)
def test_no_file_of_a_run_is_unpickled(name: str, tmp_path: Path) -> None:
    file, mark = tmp_path / name, tmp_path / "unpickled"
    write, read = _PICKLES[name]
    write(file, _Mark(mark))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        read(file)
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Mark(mark)))
    assert mark.exists()


_FILES = ["config.yaml", "environment.json", "metrics.jsonl", "scores.parquet", "gallery/gallery.json", "compare.json"]


@pytest.mark.parametrize("name", [*_FILES, "sweep.yaml", "results.parquet", "audit.parquet", "audit.json"])
@pytest.mark.parametrize("kind", ["pickle", "yaml"])
def test_a_report_runs_nothing_of_a_damaged_folder(name: str, kind: str, finished: Path, tmp_path: Path) -> None:
    run, mark = foreign(finished, tmp_path)[0], tmp_path / "loaded"
    content = f"a: !!python/object/apply:os.mkdir ['{mark}']\n".encode()
    (run / name).write_bytes(pickle.dumps(_Mark(mark)) if kind == "pickle" else content)
    for command in ("report", "show"):
        run_command(command, run)
    assert not mark.exists()
