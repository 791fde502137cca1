"""Run the command line in its own process, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT


def environment() -> dict[str, str]:
    """Return environment variables with which a command imports the package of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def rayprune(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it."""
    command = [sys.executable, "-m", "rayprune", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment())
