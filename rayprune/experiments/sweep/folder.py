"""The files of a sweep: the state of each trial, and the tables of results.

sweep.yaml                   the resolved config, with its section `sweep`
trials/<name>/               a run folder for each trial, with trial.json: its point and its status
results.parquet, results.csv a row per trial that has begun
pareto/<name>.yaml           the config of each trial on the Pareto front, ready for `rayprune train`

A trial is on the Pareto front if no other trial is more accurate without costing more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from rayprune.config import Config
from rayprune.core.redaction import redacted_tree
from rayprune.engine.storage.costs import costs_of
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.experiments.folder import ExperimentFolder
from rayprune.experiments.sweep.space import Point, listed_points, sweep_digest, trial_config
from rayprune.paths import replace_file, replace_folder

Row = dict[str, Any]
# Status of a trial. The same command resumes unfinished trials and repeats failed ones.
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
    """The state of a trial, as in its trial.json.

    Attributes:
        name: of the trial's folder.
        point: the swept keys and their values.
        status: how the trial ended, or "unfinished".
        error: error of a failed trial, in one line.
    """

    name: str
    point: Point
    status: str = UNFINISHED
    error: str | None = None

    @property
    def shown_point(self) -> Point:
        """The point without secrets."""
        return dict(redacted_tree(self.point))


def write_state(folder: Path, state: TrialState) -> None:
    """Write the trial.json of a trial."""
    file = folder / "trials" / state.name / "trial.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"point": state.shown_point, "status": state.status, "error": state.error}
    write_whole(file, json.dumps(content, indent=1) + "\n", private=True)


def read_states(folder: Path) -> dict[str, TrialState]:
    """Return name → state of the trials that have begun, in order."""
    files = sorted((folder / "trials").glob("*/trial.json"))
    return {file.parent.name: TrialState(file.parent.name, **json.loads(file.read_text())) for file in files}


def result_row(folder: Path, state: TrialState, amortise: int = 1) -> Row:
    """Return a trial's row: its point, its status, and the figures of its last epoch, not of its best."""
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
    return {"trial": state.name, **state.shown_point, "status": state.status, "error": state.error, **figures}


def finished_rows(base: Config, folder: Path) -> list[Row] | None:
    """Return the rows of a sweep if it is finished, otherwise None; does not read its data."""
    if not ExperimentFolder(folder, "sweep.yaml", sweep_digest).is_current(base, "results.parquet"):
        return None
    states, section = read_states(folder).values(), base.sweep
    num_trials = section.num_trials if section.search == "optuna" else len(listed_points(section))
    if len(states) != num_trials or any(state.status not in {FINISHED, STOPPED} for state in states):
        return None
    return mark_front([result_row(folder, state, section.amortise) for state in states])


def mark_front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with a column `pareto`: whether a finished trial is on the front of accuracy against FLOPs.

    FLOPs compare the costs of different networks. If they are unknown, the cost is the number of samples trained.
    """
    finished = [row for row in rows if row["status"] == FINISHED and row["val_accuracy"] is not None]
    flags = pareto_front(
        [row["val_accuracy"] for row in finished], [row["flops"] or row["compute"] for row in finished]
    )
    front = {row["trial"] for row, flag in zip(finished, flags, strict=True) if flag}
    return [{**row, "pareto": row["trial"] in front} for row in rows]


def pareto_front(gains: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Return which points are on the Pareto front: no other point has as much gain for less, or more for as much.

    Args:
        gains: the larger, the better, such as accuracies; a point with NaN is never on the front.
        costs: the smaller, the better, such as compute; one per gain.

    >>> pareto_front([0.9, 0.8, 0.85], [3.0, 1.0, 3.0])
    [True, True, False]
    """
    gain, cost = np.array(gains, float), np.array(costs, float)
    as_good = (gain >= gain[:, None]) & (cost <= cost[:, None])  # [i, j]: point j is at least as good as i in both
    better = (gain > gain[:, None]) | (cost < cost[:, None])
    front = ~(as_good & better).any(axis=1) & ~np.isnan(gain + cost)
    return [bool(flag) for flag in front]


def write_results(folder: Path, base: Config, rows: Sequence[Row]) -> None:
    """Write results.parquet, results.csv and pareto/ from rows of `mark_front`."""
    table = pd.DataFrame(list(rows)).astype(_FIGURES)
    for key in base.sweep.space:
        values = table[key].tolist()
        if isinstance(values[0], dict | list) or any(type(value) is not type(values[0]) for value in values):
            # A column of numbers and mappings becomes text that YAML can read.
            table[key] = [_one_line_yaml(value) for value in values]
    write_whole(folder / "results.csv", table.to_csv(index=False))
    with replace_file(folder / "results.parquet") as partial:
        table.to_parquet(partial, index=False)
    with replace_folder(folder / "pareto") as fresh:
        for row in rows:
            if row["pareto"]:
                config = trial_config(base, {key: row[key] for key in base.sweep.space})
                run = config.run.model_copy(update={"name": None})
                # Train again on the samples that the sweep held out.
                data = config.data.model_copy(update={"hold_out": base.data.hold_out})
                text = config.model_copy(update={"run": run, "data": data}).to_yaml()
                write_whole(fresh / f"{row['trial']}.yaml", text, private=True)


def _one_line_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).split("\n")[0]
