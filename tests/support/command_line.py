"""Run the command line in its own process, as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


def environment() -> dict[str, str]:
    """Return environment variables with which a command imports the package of this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def loaded_modules(names: Sequence[str], *words: str, cwd: Path = ROOT) -> tuple[str, set[str]]:
    """Run a command; return what it prints, and which of these modules it has imported."""
    code = (
        f"import sys; sys.argv = ['rayprune', *{list(words)}]\n"
        "from rayprune.cli.main import main\n"
        f"try:\n    main()\nfinally:\n    print('LOADED', *sorted(set({list(names)}) & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment())
    printed, _, loaded = done.stdout.rpartition("LOADED")
    return printed, set(loaded.split())


def start_group(*words: str) -> subprocess.Popen[str]:
    """Start a command as a shell does in a terminal: in a process group of its own, which Ctrl-C signals.

    SIGINT has its default action, even if these tests run in the background, where shells ignore it.
    """
    command = [sys.executable, "-u", "-m", "rayprune", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A handler, unlike "ignored", becomes the default action in a new program. preexec_fn would fork this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, text=True, env=environment(), start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def rayprune(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command and wait for it."""
    command = [sys.executable, "-m", "rayprune", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment())
