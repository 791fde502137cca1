"""The folder of a sweep: what each trial is, how it ended, and the tables of all.

sweep.yaml                   the resolved config, with its section `sweep`
trials/<name>/               a run folder each, and trial.json: the point, how it ended
results.parquet, results.csv a row a trial, as far as the sweep has come
pareto/<name>.yaml           the config of each trial on the Pareto front, ready for `rayprune train`

The Pareto front of runs: those that no other run beats in accuracy without costing more.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rayprune.config import Config, make_config
from rayprune.config.yaml import read_yaml
from rayprune.engine.storage.costs import costs_of
from rayprune.engine.storage.resume import lock_folder
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.errors import ConfigError
from rayprune.experiments.sweep.space import Point, sweep_digest, trial_config

Row = dict[str, Any]
# How a trial ended; anything else goes on with the same command.
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
        name: of its folder.
        point: the swept keys and their values.
        status: how it ended, or "unfinished".
        error: what ended it, in one line.
    """

    name: str
    point: Point
    status: str = UNFINISHED
    error: str | None = None


def check_sweep_folder(base: Config, folder: Path) -> None:
    """Refuse a folder that holds a run or another sweep.

    Raises:
        ConfigError: it does; nothing was touched.
    """
    stored = folder / "sweep.yaml"
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds a run, not a sweep: choose another run.name")
    if stored.exists():
        try:
            theirs = sweep_digest(make_config(read_yaml(stored.read_text()) or {}))
        except (OSError, ValueError) as error:
            line = " ".join(str(error).split())
            raise ConfigError(f"{stored} can't be read ({line}): restore it or choose another run.name") from None
        if theirs != sweep_digest(base):
            raise ConfigError(
                f"{folder} holds another sweep (config {theirs}, this is {sweep_digest(base)}): choose another run.name"
            )


@contextlib.contextmanager
def open_sweep(base: Config, folder: Path) -> Iterator[None]:
    """Create a sweep's folder, or check that the one that is there is this sweep's; hold it while the block runs.

    Raises:
        ConfigError: it is a run's folder, another sweep's, in use, or can't be written; nothing was touched.
    """
    check_sweep_folder(base, folder)
    with contextlib.ExitStack() as held:
        try:
            (folder / "trials").mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_folder(folder))
            write_whole(folder / "sweep.yaml", base.to_yaml())
        except OSError as error:
            raise ConfigError(
                f"sweep folder {folder} can't be written ({error.strerror}): set run.storage_path"
            ) from None
        yield


def write_state(folder: Path, state: TrialState) -> None:
    """Write a trial's trial.json."""
    own = folder / "trials" / state.name
    own.mkdir(parents=True, exist_ok=True)
    content = {"point": state.point, "status": state.status, "error": state.error}
    write_whole(own / "trial.json", json.dumps(content, indent=1) + "\n")


def read_states(folder: Path) -> dict[str, TrialState]:
    """Return the name of each trial that has begun → its state, in order."""
    states = {}
    for file in sorted((folder / "trials").glob("*/trial.json")):
        states[file.parent.name] = TrialState(file.parent.name, **json.loads(file.read_text()))
    return states


def result_row(folder: Path, state: TrialState, amortise: int = 1) -> Row:
    """Return a trial's row: its point, how it ended, and the figures of its last epoch (never of its best)."""
    metrics = read_metrics(folder / "trials" / state.name)
    figures: Row = dict.fromkeys(_FIGURES)
    if metrics:
        last = metrics[-1]
        epochs, costs = last["epoch"] + 1, costs_of(folder / "trials" / state.name, metrics, amortise)
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
    """Return the rows with a column `pareto`: on the front of accuracy against FLOPs, among finished trials.

    Compute in samples trained is in the same order where the trials share a network, and says nothing where not.
    """
    done = [row for row in rows if row["status"] == FINISHED and row["val_accuracy"] is not None]
    flags = pareto_front([row["val_accuracy"] for row in done], [row["flops"] or row["compute"] for row in done])
    front = {row["trial"] for row, flag in zip(done, flags, strict=True) if flag}
    return [{**row, "pareto": row["trial"] in front} for row in rows]


def write_results(folder: Path, base: Config, rows: Sequence[Row]) -> None:
    """Write results.parquet, results.csv and pareto/; `rows` as of `mark_front`."""
    table = pd.DataFrame(list(rows))
    for name, kind in _FIGURES.items():
        table[name] = table[name].astype(kind)  # type: ignore[call-overload]
    for key in base.sweep.space:
        values = table[key].tolist()
        if not all(type(value) is type(values[0]) for value in values) or isinstance(values[0], dict | list):
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


def pareto_front(gains: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Tell which points are on the front: no other gains as much at no more cost, and more of one or less of the other.

    Args:
        gains: to be large, such as accuracies; a point with NaN is never on the front.
        costs: to be small, such as compute; as many.

    >>> pareto_front([0.9, 0.8, 0.85], [3.0, 1.0, 3.0])
    [True, True, False]
    """
    order = sorted(
        (i for i, (gain, cost) in enumerate(zip(gains, costs, strict=True)) if gain == gain and cost == cost),
        key=lambda i: (costs[i], -gains[i]),
    )
    front = [False] * len(gains)
    best: tuple[float, float] | None = None  # gain and cost of the front's last point
    for i in order:
        if best is None or gains[i] > best[0]:
            best = (gains[i], costs[i])
        # An equal twin is beaten by nothing either.
        front[i] = best == (gains[i], costs[i])
    return front
