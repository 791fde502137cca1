"""The trials of a sweep on disk: what each is, how it ended, and the tables of all.

sweep.yaml                   the resolved config, with its section `sweep`
trials/<name>/               a run folder each, and trial.json: the point, how it ended
results.parquet, results.csv a row per trial, as far as the sweep has come
pareto/<name>.yaml           the config of each trial on the Pareto front, ready for `rayprune train`

A trial is on the Pareto front if no other trial is more accurate without costing more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rayprune.config import Config
from rayprune.engine.storage.costs import costs_of
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.experiments.sweep.space import Point, trial_config

Row = dict[str, Any]
# How a trial ended; an unfinished one is resumed by the same command, and a failed one tried again.
FINISHED, STOPPED, FAILED, UNFINISHED = "finished", "stopped", "failed", "unfinished"
_FIGURES = {
    "epochs": "Int64",
    "val_accuracy": "float64",
    "samples_trained": "Int64",
    "samples_forwarded": "Int64",
    "compute": "float64",
    "compute_share": "float64",
    "flops": "float64",
    "seconds": "float64",
}


@dataclass(frozen=True)
class TrialState:
    """What trial.json holds.

    Attributes:
        name: of the trial's folder, which holds the file.
        point: the swept keys and their values.
        status: how the trial ended, or "unfinished".
        error: what ended a failed trial, in one line.
    """

    name: str
    point: Point
    status: str = UNFINISHED
    error: str | None = None


def write_state(folder: Path, state: TrialState) -> None:
    """Write a trial's trial.json."""
    file = folder / "trials" / state.name / "trial.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"point": state.point, "status": state.status, "error": state.error}
    write_whole(file, json.dumps(content, indent=1) + "\n")


def read_states(folder: Path) -> dict[str, TrialState]:
    """Return the name of each trial that has begun → its state, in order."""
    states = {}
    for file in sorted((folder / "trials").glob("*/trial.json")):
        states[file.parent.name] = TrialState(file.parent.name, **json.loads(file.read_text()))
    return states


def result_row(folder: Path, state: TrialState, amortise: int = 1) -> Row:
    """Return a trial's row: its point, how it ended, and the figures of its last epoch, never of its best."""
    run = folder / "trials" / state.name
    figures: Row = dict.fromkeys(_FIGURES)
    if metrics := read_metrics(run):
        last, costs = metrics[-1], costs_of(run, metrics, amortise)
        epochs = last["epoch"] + 1
        figures = {
            "epochs": epochs,
            "val_accuracy": last["val_accuracy"],
            "samples_trained": costs.samples_trained,
            "samples_forwarded": costs.samples_forwarded,
            "compute": costs.compute,
            "compute_share": costs.compute / (last["num_samples"] * epochs),
            "flops": costs.flops,
            "seconds": costs.wall_time,
        }
    return {"trial": state.name, **state.point, "status": state.status, "error": state.error, **figures}


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a column `pareto`: whether a finished trial is on the front of accuracy against FLOPs.

    FLOPs, as samples trained compare costs only between trials of the same network; samples trained where FLOPs are
    unknown.
    """
    finished = [row for row in rows if row["status"] == FINISHED and row["val_accuracy"] is not None]
    flags = pareto_front(
        [row["val_accuracy"] for row in finished], [row["flops"] or row["compute"] for row in finished]
    )
    front = {row["trial"] for row, flag in zip(finished, flags, strict=True) if flag}
    return [{**row, "pareto": row["trial"] in front} for row in rows]


def pareto_front(gains: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Tell which points are on the front: no other point gains as much for less, or more for as much.

    Args:
        gains: to be large, such as accuracies; a point with NaN is never on the front.
        costs: to be small, such as compute; as many.

    >>> pareto_front([0.9, 0.8, 0.85], [3.0, 1.0, 3.0])
    [True, True, False]
    """
    gain, cost = np.array(gains, float), np.array(costs, float)
    as_good = (gain >= gain[:, None]) & (cost <= cost[:, None])  # [i, j]: j is as good as i in both
    better = (gain > gain[:, None]) | (cost < cost[:, None])
    front = ~(as_good & better).any(axis=1) & ~np.isnan(gain + cost)
    return [bool(flag) for flag in front]


def write_results(folder: Path, base: Config, rows: Sequence[Row]) -> None:
    """Write results.parquet, results.csv and pareto/; `rows` as of `mark_front`."""
    table = pd.DataFrame(list(rows)).astype(_FIGURES)
    for key in base.sweep.space:
        values = table[key].tolist()
        if isinstance(values[0], dict | list) or any(type(value) is not type(values[0]) for value in values):
            # Numbers beside mappings: one column of text that YAML reads back.
            table[key] = [_one_line_yaml(value) for value in values]
    write_whole(folder / "results.csv", table.to_csv(index=False))
    partial = folder / "results.parquet.partial"
    table.to_parquet(partial, index=False)
    partial.replace(folder / "results.parquet")
    fresh = folder / "pareto.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for row in rows:
        if row["pareto"]:
            config = trial_config(base, {key: row[key] for key in base.sweep.space})
            run = config.run.model_copy(update={"name": None})
            # The choice is made: what was held out for it is trained on again.
            data = config.data.model_copy(update={"hold_out": base.data.hold_out})
            (fresh / f"{row['trial']}.yaml").write_text(config.model_copy(update={"run": run, "data": data}).to_yaml())
    shutil.rmtree(folder / "pareto", ignore_errors=True)
    fresh.replace(folder / "pareto")


def _one_line_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).split("\n")[0]
