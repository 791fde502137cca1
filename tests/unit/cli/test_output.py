"""What a command prints can't control the terminal, and output that can't be written can't end the command."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayprune.cli import console, methods, sweep
from rayprune.cli.output import LogLines, _SafeFile, is_closed_pipe
from rayprune.engine.storage.run_folder import read_metrics
from tests.support.command_line import environment
from tests.support.paths import ROOT

HOSTILE = "x[/b][red]\x1b[31m\x07\u202e"
SHOWN = r"x[/b][red]\x1b[31m\x07\u202e"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the commands print on a terminal without colors."""
    written = io.StringIO()
    for module in (console, methods, sweep):
        shown = Console(force_terminal=True, no_color=True, file=written, soft_wrap=True, width=200)
        monkeypatch.setattr(module, "console", shown)
    return written


def test_lines_tables_and_live_tables_show_names_literally(terminal: io.StringIO) -> None:
    console.say(HOSTILE)
    console.warn(HOSTILE)
    console.say_table([("name", "n"), (HOSTILE, "1")])
    methods._print_table([HOSTILE], [[HOSTILE]])
    with sweep.SweepDisplay([HOSTILE]) as display:
        display._show({"trial": HOSTILE, HOSTILE: HOSTILE, "status": "running", "epochs": 1})
    text = terminal.getvalue()
    assert text.count(SHOWN) >= 7
    assert "\x1b[31m" not in text
    assert "\x07" not in text


def test_log_records_are_single_printable_lines(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "checkpoint %s\nis damaged", (HOSTILE,), None)
    LogLines().emit(record)
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    LogLines().emit(record)
    line = f"checkpoint {SHOWN} is damaged"
    assert capsys.readouterr().err.splitlines() == [line, f"{line} (why)"]


def shell(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command line in bash, `rayprune` being the command of this checkout."""
    text = f'rayprune() {{ "{sys.executable}" -m rayprune "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", text], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, **options
    )


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        ("> /dev/full", 1, "No space left on device"),
        (">&-", 1, "Bad file descriptor"),
        ("<&- 2>&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written(redirection: str, code: int, words: str) -> None:
    done = shell(f"rayprune schema {redirection}")
    assert done.returncode == code
    if words:
        assert done.stderr.startswith("error: standard output can't be written")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        assert done.stderr == ""


def test_a_closed_pipe_is_remembered_and_later_output_dropped() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    file = _SafeFile(writing, "w")
    stream = io.TextIOWrapper(io.BufferedWriter(file), line_buffering=True)
    for _ in range(3):
        stream.write("line\n")
    stream.close()
    assert file.failure is not None
    assert is_closed_pipe(file.failure)


@pytest.mark.scenario
def test_training_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    words = (
        f"train configs/digits_full.yaml scaling.num_workers=0 train.epochs=3 run.storage_path={tmp_path} run.name=a"
    )
    done = shell(f"rayprune {words} | head -n 1; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == 141
    assert done.stderr == ""
    assert len(read_metrics(tmp_path / "a")) == 3
    assert (tmp_path / "a" / "scores.parquet").exists()
