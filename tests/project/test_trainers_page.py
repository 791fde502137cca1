"""Each diff of docs/trainers.md is two programs that run: without rayprune, and with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.test_docs import blocks
from tests.support.command_line import environment
from tests.support.paths import ROOT

DIFFS = blocks(ROOT / "docs" / "trainers.md", "diff")


@pytest.mark.parametrize("diff", DIFFS, ids=["huggingface", "lightning", "accelerate"])
@pytest.mark.parametrize("sign", [pytest.param("-", marks=pytest.mark.scenario), "+"])
def test_the_programs_of_a_diff_run(diff: str, sign: str, tmp_path: Path) -> None:
    lines = [line[1:] for line in diff.splitlines() if line[:1] in ("", " ", sign)]
    (tmp_path / "program.py").write_text("\n".join(lines))
    settings = {**environment(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("rayprune" in "\n".join(lines)) == (sign == "+")


@pytest.mark.parametrize("diff", DIFFS)
def test_a_diff_is_short(diff: str) -> None:
    added = [line for line in diff.splitlines() if line.startswith("+") and line != "+import rayprune"]
    assert len(added) <= 4
