"""Collect the runs, sweeps and comparisons that a report shows, from the paths that the user named.

Sweeps and comparisons are groups: each one has a conclusion, a plot, a table, and a few runs to show in detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rayprune.errors import RunFolderError, one_line
from rayprune.report.audit import Audit, read_audit_section
from rayprune.report.gallery import read_gallery
from rayprune.report.plots.experiments import intervals_plot, pareto_plot
from rayprune.report.plots.style import Plot
from rayprune.report.read import RunRecord, read_comparison, read_exits, read_results, read_run
from rayprune.report.tables import Table, arms_table, explanation, sweep_lines, sweep_notes, trials_table, verdict_lines

_COMPARISON, _SWEEP = ("compare.yaml", "compare.json"), ("sweep.yaml", "results.parquet")  # either file is enough
_RUN = ("metrics.jsonl", "config.yaml")
_AUDIT = ("audit.parquet",)
_MAX_RUNS = 8  # of a group


@dataclass(frozen=True)
class Group:
    """A sweep or a comparison.

    Attributes:
        kind: "sweep" or "comparison".
        name: label of the group among others.
        verdict: its conclusion, a sentence each.
        plots: its plots.
        table: a row per trial or arm.
        explanation: lines below the table.
        notes: warnings.
        runs: the runs to show in detail.
        runs_text: which runs of the group they are.
    """

    kind: str
    name: str
    verdict: Sequence[str]
    plots: Sequence[Plot]
    table: Table
    explanation: Sequence[str]
    notes: Sequence[str]
    runs: Sequence[RunRecord]
    runs_text: str


@dataclass(frozen=True)
class NamedAudit:
    """A data audit, and its name among others."""

    name: str
    audit: Audit


@dataclass(frozen=True)
class Collected:
    """The contents of a report.

    Attributes:
        title: title of the page.
        named_runs: the runs that the user named.
        groups: the sweeps and comparisons.
        omissions: what was left out and why, a sentence each.
        named_audits: the audits in folders that hold no run.
    """

    title: str
    named_runs: Sequence[RunRecord]
    groups: Sequence[Group]
    omissions: Sequence[str]
    named_audits: Sequence[NamedAudit] = ()

    @property
    def audits(self) -> Sequence[NamedAudit]:
        """All audits, those of the runs' own data included."""
        return [*self.named_audits, *(NamedAudit(run.name, run.audit) for run in self.runs if run.audit is not None)]

    @property
    def runs(self) -> Sequence[RunRecord]:
        """The runs to show in detail: the named ones, or else those of the groups."""
        if self.named_runs or len(self.groups) == 1:
            return self.named_runs or self.groups[0].runs
        # Runs of several comparisons have the same names.
        return [replace(run, name=f"{group.name}: {run.name}") for group in self.groups for run in group.runs]

    @property
    def runs_text(self) -> str:
        """Which runs are shown beside groups; "" without groups."""
        groups = [group for group in self.groups if group.runs]
        if groups and self.named_runs:
            return "The runs that were named. Runs of a sweep or a comparison are shown where no others are named."
        if self.named_runs:
            return ""
        return " ".join(f"{group.name}: {group.runs_text}" if len(groups) > 1 else group.runs_text for group in groups)

    @property
    def run_notes(self) -> list[str]:
        """What is missing or damaged in the runs, a line each."""
        runs = self.runs
        return [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]

    @property
    def gallery_note(self) -> str:
        """Which finished runs have no notable samples, in one line; "" if all have some."""
        finished = [run for run in self.runs if run.scores is not None and not run.is_own_loop]
        names = [run.name for run in finished if run.gallery is None]
        if not names:
            return ""
        prefix = "" if len(self.runs) == 1 else ", ".join(names[:3]) + (", …" if len(names) > 3 else "") + ": "
        return f"{prefix}no gallery of notable samples (if it could not be written, the run printed the reason)"


def collect(folders: Sequence[Path]) -> Collected:
    """Read the runs, sweeps and comparisons in the named folders.

    A named run or group must be readable. Inside a named folder of several, unreadable ones are left out.

    Raises:
        RunFolderError: a named folder cannot be shown.
    """
    members = _members(folders)
    groups: list[Group] = []
    runs: list[RunRecord] = []
    audits: list[NamedAudit] = []
    omissions: list[str] = []
    labels = _labels([folder for folder in members if _is_group(folder)])
    labels |= _labels([folder for folder in members if folder not in labels])
    for folder, name in labels.items():
        try:
            if _is_group(folder):
                read_group = _read_comparison if _has(folder, _COMPARISON) else _read_sweep
                groups.append(read_group(folder, name, str(len(groups) or "")))
            elif _has(folder, _RUN):
                runs.append(_read_whole_run(folder, name))
            elif (found := read_audit_section(folder)) is not None:
                audits.append(NamedAudit(name, found))
            else:
                runs.append(_read_whole_run(folder, name))  # raises, and says what is missing
        except (OSError, ValueError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"{error.filename or folder} can't be read ({error.strerror}): check its permissions"
            if members[folder]:
                raise RunFolderError(reason) from None
            omissions.append(f"{name} was left out: {reason}")
    if not groups and not runs and not audits:
        raise RunFolderError(f"{folders[0]} has nothing that can be shown; {omissions[0]}")
    names = list(dict.fromkeys(folder.resolve().name for folder in folders))
    title = " and ".join(names) if len(folders) <= 2 else f"{len(folders)} results"
    return Collected(title, runs, groups, omissions, audits)


def _members(folders: Sequence[Path]) -> dict[Path, bool]:
    """Return each run or group once → whether the user named it itself."""
    members: dict[Path, tuple[Path, bool]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise RunFolderError(f"there is no folder {folder}: name a run's, such as runs/NAME")
        inside = [] if _is_result(folder) else sorted(child for child in folder.iterdir() if _is_result(child))
        for member in inside or [folder]:
            known, was_named = members.get(member.resolve(), (member, False))
            members[member.resolve()] = (known, was_named or not inside)
    return dict(members.values())


def _is_result(folder: Path) -> bool:
    """Return whether a folder is that of a run or a group; False if its permissions do not allow to look."""
    try:
        return folder.is_dir() and (_has(folder, (*_RUN, *_AUDIT)) or _is_group(folder))
    except OSError:  # folders of other users, such as lost+found
        return False


def _is_group(folder: Path) -> bool:
    return _has(folder, (*_COMPARISON, *_SWEEP))


def _has(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).exists() for name in names)


def _labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Return each folder → the shortest end of its path that is unique."""
    paths = [folder.resolve().parts for folder in folders]
    labels = {}
    for folder, own in zip(folders, paths, strict=True):
        ends = (own[-size:] for size in range(1, len(own) + 1))
        end = next(end for end in ends if sum(path[-len(end) :] == end for path in paths) == 1)
        labels[folder] = str(Path(*end))
    return labels


def _read_whole_run(folder: Path, name: str) -> RunRecord:
    """Read a run with its gallery, its audit and its evaluations."""
    run = read_run(folder, name)
    return replace(run, gallery=read_gallery(folder), audit=read_audit_section(folder), exits=read_exits(folder))


def _read_comparison(folder: Path, name: str, suffix: str) -> Group:
    """Read a comparison; the suffix makes the key of its plot unique in the report."""
    file = folder / "compare.json"
    if not file.exists():
        raise RunFolderError(
            f"{folder} has no compare.json yet, it is written when all runs have finished: rayprune report "
            f"{folder}/runs shows the runs so far"
        )
    comparison = read_comparison(file)
    # Matched arms that are full training share its run.
    names: dict[Path, str] = {}
    for arm in comparison.arms:
        names.setdefault(folder / "runs" / arm.runs[0].folder, arm.name)
    runs, omissions = _readable_runs(names)
    return Group(
        kind="comparison",
        name=name,
        verdict=list(verdict_lines(comparison)),
        plots=[intervals_plot(comparison, f"intervals{suffix}")],
        table=arms_table(comparison),
        explanation=list(explanation(comparison)),
        notes=[*comparison.notes, *omissions],
        runs=runs,
        runs_text=f"The run of each arm with seed {comparison.seeds[0]}.",
    )


def _read_sweep(folder: Path, name: str, suffix: str) -> Group:
    file = folder / "results.parquet"
    if not file.exists():
        raise RunFolderError(f"{folder} has no results.parquet yet: try again when its first trial has ended")
    results = read_results(file)
    rows, keys = results.rows, results.keys
    front = [row for row in rows if row["pareto"]]
    names = {folder / "trials" / row["trial"]: " ".join(str(row[key]) for key in ("trial", *keys)) for row in front}
    runs, omissions = _readable_runs(names)
    plot = pareto_plot(results, name, f"pareto{suffix}")
    some = f", {_MAX_RUNS} of them" if len(front) > _MAX_RUNS else ""
    return Group(
        kind="sweep",
        name=name,
        verdict=sweep_lines(rows, keys),
        plots=[] if plot is None else [plot],
        table=trials_table(rows, keys),
        explanation=list(sweep_notes(rows)),
        notes=[*(f"{row['trial']} failed: {row['error']}" for row in rows if row["error"]), *omissions],
        runs=runs,
        runs_text=f"The finished trials on the Pareto front{some}.",
    )


def _readable_runs(names: dict[Path, str]) -> tuple[list[RunRecord], list[str]]:
    """Return the runs of a group that exist, and a note for each one that can't be read."""
    runs, omissions = [], []
    for folder, name in list(names.items())[:_MAX_RUNS]:
        try:
            if (folder / "metrics.jsonl").exists():
                runs.append(_read_whole_run(folder, name))
        except (OSError, ValueError) as error:
            omissions.append(f"{name} is not among the runs below: {one_line(error)}")
    return runs, omissions
