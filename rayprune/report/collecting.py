"""Which runs, sweeps and comparisons a report is of, out of the paths that were named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayprune.report.groups import Group, read_group
from rayprune.report.reading import RunRecord, read_run


@dataclass(frozen=True)
class Collected:
    """What a report shows.

    Attributes:
        title: of the page.
        runs: to be laid over each other: those that were named, or those that the groups point to.
        groups: sweeps and comparisons.
    """

    title: str
    runs: Sequence[RunRecord]
    groups: Sequence[Group] = ()

    @property
    def notes(self) -> list[str]:
        """What is missing or damaged, a line each."""
        return [f"{run.name}: {note}" for run in self.runs for note in run.notes]


def collect(folders: Sequence[Path]) -> Collected:
    """Read what the folders hold.

    Raises:
        ValueError: one holds nothing to report; one line with the cure.
    """
    runs: list[Path] = []
    groups: list[Group] = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: name a run's, such as runs/NAME")
        if (group := read_group(folder, len(groups))) is not None:
            groups.append(group)
        else:
            runs += _runs_in(folder) or [folder]
    runs = list(dict.fromkeys(runs))
    title = " and ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    title = title if len(folders) <= 2 else f"{len(folders)} results"
    return Collected(title, _named(runs) or [run for group in groups for run in group.runs], groups)


def _runs_in(folder: Path) -> list[Path]:
    """Return the runs right below a folder that is none itself."""
    if (folder / "metrics.jsonl").exists() or (folder / "config.yaml").exists():
        return []
    return sorted(file.parent for file in folder.glob("*/metrics.jsonl"))


def _named(folders: Sequence[Path]) -> list[RunRecord]:
    """Read the runs; those in folders of one name are told apart by the folder above."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}")
        for folder, name in zip(folders, names, strict=True)
    ]
