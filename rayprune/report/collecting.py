"""Which runs, sweeps and comparisons a report is of, out of the paths that were named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rayprune.report.groups import Group, checked_run, is_group, read_group
from rayprune.report.reading import RunRecord

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
                raise ValueError(line) from None
            left_out.append(f"{name} was left out: {line}")
    if not groups and not runs:
        raise ValueError(f"{folders[0]} holds nothing that can be shown; {left_out[0]}")
    title = " and ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    title = title if len(folders) <= 2 else f"{len(folders)} results"
    return Collected(title, runs or _runs_of(groups), groups, left_out, named=bool(runs))


def _members(folders: Sequence[Path]) -> dict[Path, bool]:
    """Return the folder of each run or group, once → whether it was named itself."""
    members: dict[Path, tuple[Path, bool]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: name a run's, such as runs/NAME")
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
