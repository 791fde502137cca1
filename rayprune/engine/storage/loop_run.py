"""The run folder of a training loop of the user's own, which reports and selections read like any other.

It has config.yaml, environment.json, metrics.jsonl, and scores.parquet after the last epoch. The loop's checkpoints are
the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rayprune.core.redaction import redacted_tree
from rayprune.engine.storage.run_folder import (
    append_metrics,
    read_json,
    read_metrics,
    start_metrics,
    write_environment,
    write_whole,
)
from rayprune.errors import RunFolderError, one_line

_SUMMED = ("samples_trained", "samples_padded", "samples_forwarded", "compute", "wall_time")


@dataclass(frozen=True)
class LoopRun:
    """The run folder of a loop, of which a process may be one of several attempts.

    Attributes:
        folder: the run folder.
        start: names this call of `prune` or `local_loader`; the same in all its attempts.
        config: what config.yaml holds.
        facts: what environment.json holds besides versions and hardware.
    """

    folder: Path
    start: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    def check(self) -> None:
        """Refuse a folder that cannot be this run's, before training.

        Raises:
            RunFolderError: it cannot be written, or holds another run.
        """
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            start_metrics(folder)
        except OSError as error:
            raise RunFolderError(
                f"run folder {folder} can't be written ({error.strerror or one_line(error)}): name another run="
            ) from None
        file = folder / "environment.json"
        fingerprint = read_json(file).get("fingerprint") if file.exists() else None
        is_other = read_metrics(folder) and fingerprint != self.facts["fingerprint"]
        if is_other or (folder / "checkpoints").is_dir():
            raise RunFolderError(f"run folder {folder} holds a run on other data: name another run=, or delete it")

    def open(self, epoch: int, *, resumed: bool) -> None:
        """Begin an attempt at an epoch: lines of this and later epochs will be written again.

        Raises:
            RunFolderError: the folder holds epochs of an earlier start that this one does not continue.
        """
        folder = self.folder
        lines = read_metrics(folder)
        environment = read_json(folder / "environment.json") if (folder / "environment.json").exists() else {}
        if any(line["epoch"] >= epoch for line in lines) and not resumed and environment.get("start") != self.start:
            raise RunFolderError(
                f"run folder {folder} holds {len(lines)} epochs of an earlier start: load its state "
                "(shard.load_state_dict), name another run=, or delete the folder"
            )
        kept = [json.dumps(line) + "\n" for line in lines if line["epoch"] < epoch]
        write_whole(folder / "metrics.jsonl", "".join(kept))
        text = yaml.safe_dump(redacted_tree(self.config), sort_keys=False)
        write_whole(folder / "config.yaml", text, private=True)
        write_environment(folder, start=self.start, **self.facts)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append an epoch's line, whose counts and seconds are added to those of the epochs before it."""
        folder = self.folder
        before = [earlier for earlier in read_metrics(folder) if earlier["epoch"] < line["epoch"]]
        totals = {name: line[name] + (before[-1][name] if before else 0) for name in _SUMMED}
        append_metrics(folder, {**line, **totals})
