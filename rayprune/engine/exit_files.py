"""What an evaluation of exits leaves in the run folder.

    <run>/exits/thresholds.json   for each budget p: the thresholds, the samples that they were found on
    <run>/exits/anytime.csv       a row an exit: multiply-adds, accuracy, loss
    <run>/exits/dynamic.csv       a row a budget: accuracy against multiply-adds, share of samples an exit
    <run>/exits/latency.csv       a row an exit and batch size: measured seconds

Each names the checkpoint that it is of; what another checkpoint left is deleted, so that no picture mixes two.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = "exits"
_THRESHOLDS = "thresholds.json"
_DRAWN = "accuracy_macs.png"


def clear_others(run_folder: Path, checkpoint: str) -> None:
    """Make <run>/exits, and delete there what an evaluation of another checkpoint left."""
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    files = [*folder.glob("*.csv"), folder / _THRESHOLDS]
    others = [file for file in files if file.exists() and _checkpoint_of(file) != checkpoint]
    for file in [*others, *([folder / _DRAWN] if others else [])]:
        file.unlink(missing_ok=True)


def write_rows(run_folder: Path, name: str, checkpoint: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write <run>/exits/NAME.csv: the checkpoint, then the rows' own columns."""
    file = run_folder / FOLDER / f"{name}.csv"
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["checkpoint", *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"checkpoint": checkpoint, **row} for row in rows)
    return partial.replace(file)


def write_thresholds(run_folder: Path, facts: Mapping[str, Any], thresholds: Mapping[int, NDArray[np.float32]]) -> Path:
    """Write <run>/exits/thresholds.json.

    Args:
        run_folder: of the run.
        facts: what else the file says: checkpoint, model, what the thresholds were found on.
        thresholds: budget → (K,) float32 with −inf for the last exit, which the file leaves out; JSON has no
            infinity, and +inf is null there.
    """
    budgets = [
        {"p": budget, "thresholds": [None if np.isinf(value) else float(value) for value in found[:-1]]}
        for budget, found in thresholds.items()
    ]
    file = run_folder / FOLDER / _THRESHOLDS
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**facts, "budgets": budgets}, indent=1) + "\n")
    return partial.replace(file)


def read_thresholds(run_folder: Path | str, budget: int) -> NDArray[np.float32]:
    """Return the thresholds that an evaluation found for a budget.

    Args:
        run_folder: of a run that was evaluated.
        budget: p, 1..39.

    Returns:
        (K,) float32: +inf where nobody leaves, −inf at the last exit.

    Raises:
        ValueError: the run has none.
    """
    file = Path(run_folder) / FOLDER / _THRESHOLDS
    if not file.exists():
        raise ValueError(f"{run_folder} has no thresholds yet: rayprune evaluate {run_folder} --mode dynamic")
    stored = {entry["p"]: entry["thresholds"] for entry in json.loads(file.read_text())["budgets"]}
    if budget not in stored:
        raise ValueError(f"{file} has no budget p = {budget}: it has {min(stored)} to {max(stored)}")
    return np.array([np.inf if value is None else value for value in stored[budget]] + [-np.inf], np.float32)


def _checkpoint_of(file: Path) -> str | None:
    """Return the checkpoint that a file is of; None for one that can't be read."""
    try:
        if file.suffix == ".json":
            return str(json.loads(file.read_text())["checkpoint"])
        with file.open(newline="") as stream:
            return next(csv.DictReader(stream), {}).get("checkpoint")
    except (ValueError, KeyError):
        return None
