"""What a sweep or a comparison comes to: its verdict, its picture, its table, and the runs worth looking into."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from rayprune.report import intervals
from rayprune.report.compared import HEADS, compare_rows, explanation, verdict_lines
from rayprune.report.curves import Plot
from rayprune.report.plots import SIZE, pareto
from rayprune.report.reading import RunRecord, read_run
from rayprune.report.summary import Table
from rayprune.report.swept import sweep_cells

_MOST_RUNS = 8  # of a group are laid over each other: as many colours as there are


@dataclass(frozen=True)
class Group:
    """A sweep or a comparison.

    Attributes:
        name: of its folder.
        kind: "sweep" or "comparison".
        verdict: sentences that come first.
        plots: its pictures.
        table: a row a trial or an arm.
        explanation: what the table's columns mean.
        notes: what to beware of.
        runs: of it, to be laid over each other.
        runs_text: which those are.
    """

    name: str
    kind: str
    verdict: Sequence[str]
    plots: Sequence[Plot]
    table: Table
    explanation: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    runs: Sequence[RunRecord] = field(default_factory=tuple)
    runs_text: str = ""


def read_group(folder: Path, number: int = 0) -> Group | None:
    """Read the folder of a sweep or a comparison; None where it is neither.

    Args:
        folder: any.
        number: of the group in its report: plots of two sweeps have different keys.

    Raises:
        ValueError: it has not come far enough, or is damaged; one line with the cure.
    """
    try:
        if (folder / "compare.yaml").exists() or (folder / "compare.json").exists():
            return _comparison(folder, number)
        if (folder / "sweep.yaml").exists() or (folder / "results.parquet").exists():
            return _sweep(folder, number)
    except (KeyError, TypeError, IndexError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{folder} was not written by this version ({line}): run its command again") from None
    return None


def _comparison(folder: Path, number: int) -> Group:
    file = folder / "compare.json"
    if not file.exists():
        raise ValueError(
            f"{folder} has no compare.json, which is written when all runs have ended: rayprune report {folder}/runs "
            "shows those that there are"
        )
    try:
        report: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is no JSON: run the same rayprune compare again") from None
    key = f"intervals{number or ''}"
    plot = Plot(key, "Accuracy against full training", partial(intervals.draw, report), intervals.size_of(report))
    firsts = [(arm["name"], folder / "runs" / arm["runs"][0]["folder"]) for arm in report["arms"]]
    # Arms that turned out as full training share its run.
    firsts = [pair for place, pair in enumerate(firsts) if pair[1] not in [path for _, path in firsts[:place]]]
    return Group(
        name=folder.resolve().name,
        kind="comparison",
        verdict=list(verdict_lines(report)),
        plots=[plot],
        table=Table(HEADS, compare_rows(report)),
        explanation=list(explanation(report)),
        notes=list(report["notes"]),
        runs=_readable(firsts),
        runs_text=f"Of each arm the run of seed {report['seeds'][0]}.",
    )


def _sweep(folder: Path, number: int) -> Group:
    file = folder / "results.parquet"
    if not file.exists():
        raise ValueError(f"{folder} has no results.parquet yet: try again when its first trial has ended")
    table = pd.read_parquet(file)
    keys = list(table.columns[1 : list(table.columns).index("status")])
    rows = [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]
    head, *cells = sweep_cells(rows, keys)
    front = [row for row in rows if row["pareto"]]
    best = max(front, key=lambda row: row["val_accuracy"], default=None)
    counts = pd.Series([row["status"] for row in rows]).value_counts()
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    lines = [f"{len(rows)} trials: {told}. On the Pareto front of accuracy against compute: {len(front)}."]
    if best is not None:
        point = ", ".join(f"{key} {best[key]}" for key in keys)
        lines.append(
            f"The most accurate: {best['val_accuracy']:.2%} with {point}, at {best['compute_share']:.1%} of the "
            "compute of a full run as long."
        )
    drawn = any(row["val_accuracy"] is not None and row["status"] in ("finished", "stopped") for row in rows)
    plots = [Plot(f"pareto{number or ''}", "Accuracy against compute", pareto(folder), SIZE)] if drawn else []
    shown = [(f"{row['trial']} {' '.join(str(row[key]) for key in keys)}", row["trial"]) for row in front[:_MOST_RUNS]]
    return Group(
        name=folder.resolve().name,
        kind="sweep",
        verdict=lines,
        plots=plots,
        table=Table(head, cells, words=1 + len(keys)),
        explanation=["*: on the Pareto front. Each figure is of a trial's last epoch, never of its best."],
        notes=[f"{row['trial']} failed: {row['error']}" for row in rows if row["error"]],
        runs=_readable([(name, folder / "trials" / trial) for name, trial in shown]),
        runs_text="The finished trials on the Pareto front" + (f", {_MOST_RUNS} of them." if len(front) > 8 else "."),
    )


def _readable(named: Sequence[tuple[str, Path]]) -> list[RunRecord]:
    """Read the runs that are still there: a group's own figures do not need them."""
    return [read_run(folder, name) for name, folder in named[:_MOST_RUNS] if (folder / "metrics.jsonl").exists()]


def _plain(value: Any) -> Any:
    """Return a table's cell as Python has it, None where there is nothing."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value
