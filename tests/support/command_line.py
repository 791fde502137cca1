"""The command line in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def environment() -> dict[str, str]:
    """Return the variables of a command that finds this checkout's package."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def rayprune(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "rayprune", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment())
