"""Which runs, sweeps and comparisons a report is of, out of the paths that were named.

What a sweep or a comparison comes to: its verdict, its picture, its table, and the runs worth looking into.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from rayprune.errors import RunFolderError
from rayprune.report.gallery import gallery_of
from rayprune.report.plots.experiments import PARETO_SIZE, draw_arms, pareto, read_exits, size_of
from rayprune.report.plots.runs import Plot
from rayprune.report.read import RunRecord, count_of, read_comparison, read_run, share
from rayprune.report.tables import (
    HEADS,
    Row,
    Table,
    compare_rows,
    explanation,
    read_results,
    sweep_cells,
    verdict_lines,
)
from rayprune.sources.storage import one_line

_COMPARISON, _SWEEP = ("compare.yaml", "compare.json"), ("sweep.yaml", "results.parquet")  # either makes it one
_MOST_RUNS = 8  # of a group are laid over each other: as many colours as there are


@dataclass(frozen=True)
class Group:
    """A sweep or a comparison.

    Attributes:
        name: of its folder, told apart from the others on the page.
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


def is_group(folder: Path) -> bool:
    """Whether a folder is that of a sweep or a comparison."""
    return any((folder / name).exists() for name in (*_COMPARISON, *_SWEEP))


def read_group(folder: Path, number: int = 0, name: str | None = None) -> Group:
    """Read the folder of a sweep or a comparison.

    Args:
        folder: one that `is_group`.
        number: of the group in its report: plots of two sweeps have different keys.
        name: what to call it; the folder's name where None.

    Raises:
        ValueError: it has not come far enough, or is damaged; one line with the cure.
    """
    name = name or folder.resolve().name
    if any((folder / file).exists() for file in _COMPARISON):
        return _comparison(folder, number, name)
    return _sweep(folder, number, name)


def _comparison(folder: Path, number: int, name: str) -> Group:
    file = folder / "compare.json"
    if not file.exists():
        raise RunFolderError(
            f"{folder} has no compare.json, which is written when all runs have ended: rayprune report {folder}/runs "
            "shows those that there are"
        )
    report = read_comparison(file)
    key = f"intervals{number or ''}"
    plot = Plot(key, "Accuracy against full training", partial(draw_arms, report), size_of(report))
    firsts = [(arm["name"], folder / "runs" / arm["runs"][0]["folder"]) for arm in report["arms"]]
    # Arms that turned out as full training share its run.
    firsts = [pair for place, pair in enumerate(firsts) if pair[1] not in [path for _, path in firsts[:place]]]
    runs, left_out = _readable(firsts)
    return Group(
        name=name,
        kind="comparison",
        verdict=list(verdict_lines(report)),
        plots=[plot],
        table=Table(HEADS, compare_rows(report)),
        explanation=list(explanation(report)),
        notes=[*report["notes"], *left_out],
        runs=runs,
        runs_text=f"Of each arm the run of seed {report['seeds'][0]}.",
    )


def _sweep(folder: Path, number: int, name: str) -> Group:
    file = folder / "results.parquet"
    if not file.exists():
        raise RunFolderError(f"{folder} has no results.parquet yet: try again when its first trial has ended")
    table, keys = read_results(file)
    rows = [{str(name): _plain(value) for name, value in row.items()} for row in table.to_dict("records")]
    head, *cells = sweep_cells(rows, keys)
    front = [row for row in rows if row["pareto"]]
    draw = pareto(table, keys, name)
    shown = [(f"{row['trial']} {' '.join(str(row[key]) for key in keys)}", row["trial"]) for row in front[:_MOST_RUNS]]
    runs, left_out = _readable([(label, folder / "trials" / trial) for label, trial in shown])
    return Group(
        name=name,
        kind="sweep",
        verdict=_found(rows, front, keys),
        plots=[]
        if draw is None
        else [Plot(f"pareto{number or ''}", "Accuracy against compute", draw, PARETO_SIZE, pan=True)],
        table=Table(head, cells, words=1 + len(keys)),
        explanation=["*: on the Pareto front. Each figure is of a trial's last epoch, never of its best."],
        notes=[*(f"{row['trial']} failed: {row['error']}" for row in rows if row["error"]), *left_out],
        runs=runs,
        runs_text="The finished trials on the Pareto front" + (f", {_MOST_RUNS} of them." if len(front) > 8 else "."),
    )


def _found(rows: Sequence[Row], front: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """Return what a sweep came to, in sentences."""
    counts = Counter(row["status"] for row in rows)
    told = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lines = [f"{count_of(len(rows), 'trial')}: {told}. On the Pareto front of accuracy against compute: {len(front)}."]
    if front:
        best = max(front, key=lambda row: row["val_accuracy"])
        point = ", ".join(f"{key} {best[key]}" for key in keys)
        lines.append(
            f"The most accurate: {share(best['val_accuracy'])} with {point}, at {share(best['compute_share'], 1)} of "
            "the compute of a full run as long."
        )
    return lines


def _readable(named: Sequence[tuple[str, Path]]) -> tuple[list[RunRecord], list[str]]:
    """Read the runs that are still there, and say which can't be: a group's own figures do not need them."""
    runs, left_out = [], []
    for name, folder in named[:_MOST_RUNS]:
        try:
            if (folder / "metrics.jsonl").exists():
                runs.append(checked_run(folder, name))
        except (OSError, ValueError) as error:
            left_out.append(f"{name} is not among the runs below: {one_line(error, 400)}")
    return runs, left_out


def checked_run(folder: Path, name: str) -> RunRecord:
    """Read a run with all that the page shows of it.

    Raises:
        ValueError: some of it is damaged; one line with the cure.
    """
    run = read_run(folder, name)
    # The page reads them when it draws: too late to leave this run out.
    gallery_of(run)
    read_exits(folder)
    return run


def _plain(value: Any) -> Any:
    """Return a table's cell as Python has it, None where there is nothing."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value


_OWN_RUNS = "The runs of a sweep or a comparison are shown where no others are named beside it."


@dataclass(frozen=True)
class Collected:
    """What a report shows.

    Attributes:
        title: of the page.
        runs: to be laid over each other: those that were named, or those that the groups point to.
        groups: sweeps and comparisons.
        left_out: what of a folder of runs can't be shown, a sentence each.
        named: whether the runs are those that were named.
    """

    title: str
    runs: Sequence[RunRecord]
    groups: Sequence[Group] = ()
    left_out: Sequence[str] = ()
    named: bool = True

    @property
    def notes(self) -> list[str]:
        """What is missing or damaged, a line each."""
        return [*self.left_out, *(f"{run.name}: {note}" for run in self.runs for note in run.notes)]

    @property
    def gallery_note(self) -> str:
        """Which runs that have ended show no telling samples, in one line; "" where all do."""
        lacking = [run.name for run in self.runs if run.scores is not None and run.gallery is None]
        if not lacking:
            return ""
        those = "" if len(self.runs) == 1 else ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "") + ": "
        return f"{those}no gallery of telling samples (older versions wrote none; where writing failed, the run told)"

    @property
    def runs_text(self) -> str:
        """Which runs of the groups are shown; "" where there are none."""
        groups = [group for group in self.groups if group.runs]
        if self.named:
            return f"Those that were named. {_OWN_RUNS}" if groups else ""
        return " ".join(f"{group.name}: {group.runs_text}" if len(groups) > 1 else group.runs_text for group in groups)


def collect(folders: Sequence[Path]) -> Collected:
    """Read what the folders hold.

    A run, sweep or comparison that was named must be readable; of a folder of several, what is not is left out.

    Raises:
        ValueError: one holds nothing to report; one line with the cure.
    """
    members = _members(folders)
    group_folders = [folder for folder in members if is_group(folder)]
    run_folders = [folder for folder in members if folder not in group_folders]
    groups: list[Group] = []
    runs: list[RunRecord] = []
    left_out: list[str] = []
    for folder, name in (*_names(group_folders), *_names(run_folders)):
        try:
            if folder in group_folders:
                groups.append(read_group(folder, len(groups), name))
            else:
                runs.append(checked_run(folder, name))
        except (OSError, ValueError) as error:
            line = (
                f"{error.filename or folder} can't be read ({error.strerror}): allow it"
                if isinstance(error, OSError)
                else str(error)
            )
            if members[folder]:
                raise RunFolderError(line) from None
            left_out.append(f"{name} was left out: {line}")
    if not groups and not runs:
        raise RunFolderError(f"{folders[0]} holds nothing that can be shown; {left_out[0]}")
    title = " and ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    title = title if len(folders) <= 2 else f"{len(folders)} results"
    return Collected(title, runs or _runs_of(groups), groups, left_out, named=bool(runs))


def _members(folders: Sequence[Path]) -> dict[Path, bool]:
    """Return the folder of each run or group, once → whether it was named itself."""
    members: dict[Path, tuple[Path, bool]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunFolderError(f"there is no folder {folder}: name a run's, such as runs/NAME")
        inside = [] if _is_one(folder) else sorted(child for child in folder.iterdir() if _is_one(child))
        for member in inside or [folder]:
            known = members.get(member.resolve(), (member, False))
            members[member.resolve()] = (known[0], known[1] or not inside)
    return dict(members.values())


def _is_one(folder: Path) -> bool:
    """Whether a folder is that of a run, a sweep or a comparison, as far as one may look into it."""
    try:
        return folder.is_dir() and (
            (folder / "metrics.jsonl").exists() or (folder / "config.yaml").exists() or is_group(folder)
        )
    except OSError:  # beside results there may be what belongs to others, such as lost+found
        return False


def _names(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the folders with the shortest ends of their paths that tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    named = []
    for folder, own in zip(folders, paths, strict=True):
        ends = (own[-size:] for size in range(1, len(own) + 1))
        end = next(end for end in ends if sum(path[-len(end) :] == end for path in paths) == 1)
        named.append((folder, str(Path(*end))))
    return named


def _runs_of(groups: Sequence[Group]) -> list[RunRecord]:
    """Return the runs that groups point to; those of several comparisons have the same names."""
    if len(groups) == 1:
        return list(groups[0].runs)
    return [replace(run, name=f"{group.name}: {run.name}") for group in groups for run in group.runs]
