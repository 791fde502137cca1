"""Run folders for the tests of the report and of the commands that show runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from rayprune.engine.train.driver import train
from tests.support.runs import run_config


def two_runs(storage: Path) -> list[Path]:
    """Train on everything and with InfoBatch; return both run folders, `full` and `pruned`."""
    methods = {"full": {"name": "full"}, "pruned": {"name": "infobatch", "prune_ratio": 0.5}}
    return [train(run_config(storage, name, method=method)).folder for name, method in methods.items()]


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a folder without its checkpoints, to damage it; return the copy."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("checkpoints")))
