"""Which runs, sweeps and comparisons a report is of, out of the paths that were named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayprune.report.reading import RunRecord, read_run


@dataclass(frozen=True)
class Collected:
    """What a report shows.

    Attributes:
        title: of the page.
        runs: to be laid over each other.
    """

    title: str
    runs: Sequence[RunRecord]

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
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: name a run's, such as runs/NAME")
        runs += _runs_in(folder) or [folder]
    runs = list(dict.fromkeys(runs))
    title = " and ".join(dict.fromkeys(folder.resolve().name for folder in folders))
    return Collected(title if len(folders) <= 2 else f"{len(runs)} runs", _named(runs))


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
