"""Data behind a password and a signed URL: neither is in any file of a run, and another token continues it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rayprune.cli.main import cli
from tests.support.command_line import rayprune
from tests.support.http_server import files_with, samples, serve

pytest.importorskip("aiohttp")
WORDS = ["data.source=parquet", "model.name=mlp", "train.epochs=2", "train.batch_size=20", "scaling.num_workers=0"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """HOST:PORT/NAME of a file of 200 samples, for `me:SECRET-1` and two tokens."""
    with serve(samples(), "train.parquet", "me:SECRET-1", ("SECRET-2", "SECRET-3")) as address:
        yield address


def run_command(*words: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, [*map(str, words)])


def test_no_file_and_no_line_of_a_run_has_a_secret(address: str, tmp_path: Path) -> None:
    for package in ("mlflow", "wandb"):
        pytest.importorskip(package)
    words = [*WORDS, f"run.storage_path={tmp_path}", "run.trackers=[mlflow,wandb]"]
    url = f"data.path=http://me:SECRET-1@{address}?token="
    done = rayprune("train", "digits_full", f"{url}SECRET-2", "train.stop_after=1", *words)  # W&B reads sys.argv
    assert (done.returncode, done.stderr) == (0, "")
    assert "SECRET" not in done.stdout
    assert files_with("SECRET", tmp_path) == []
    (run,) = tmp_path.iterdir()
    assert f"path: http://***@{address}?token=***" in (run / "config.yaml").read_text()
    for name in ("config.yaml", "mlflow/mlflow.db"):
        assert (run / name).stat().st_mode & 0o777 == 0o600
    assert (run / "wandb").stat().st_mode & 0o777 == 0o700

    continued = run_command("train", "digits_full", f"{url}SECRET-3", *words)
    assert "resumes at epoch 2" in continued.output
    assert "already finished" in run_command("train", "digits_full", f"{url}SECRET-2", *words).output
    cure = f"{run}/config.yaml does not hold the secret of data.path: name it again, data.path=…, or take credentials"
    assert str(run_command("audit", run).exception).startswith(cure)
    for command in (("audit", run, f"{url}SECRET-2", "audit.duplicates=false"), ("report", run)):
        assert run_command(*command).exception is None
    assert files_with("SECRET", tmp_path) == []


@pytest.mark.parametrize("word", ["data.path=http://me:SECRET-9@{}?token=SECRET-9", "a=s3://k:SECRET@b"])
def test_no_message_has_a_secret(address: str, word: str, tmp_path: Path) -> None:
    done = rayprune("train", "digits_full", word.format(address), f"run.storage_path={tmp_path}", *WORDS)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "SECRET" not in done.stdout + done.stderr
