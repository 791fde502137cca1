"""What a run folder says, as far as it has come: settings, the line of each epoch, the scores, the gallery.

A running or half-written run is read too; what is missing or torn becomes a note, which the report prints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayprune.overrides import read_yaml
from rayprune.report.cells import as_count, count_of
from rayprune.report.lines import Line, read_lines
from rayprune.sources.score_file import ScoreFile, read_scores
from rayprune.sources.storage import one_line

RUN_SCHEMA = 1  # the newest environment.json and gallery.json that is read here


@dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        folder: of the run.
        name: what it is called beside other runs.
        config: config.yaml, {} where there is none.
        environment: environment.json, {} where there is none.
        metrics: the last line of each epoch, in order; at least one.
        scores: scores.parquet, None until the run has ended.
        gallery: gallery.json, None where there is none.
        notes: what is missing or damaged, a sentence each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Line]
    scores: ScoreFile | None = None
    gallery: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def setting(self, section: str, key: str, default: Any = "–") -> Any:
        """Return a value of config.yaml."""
        found = self.config.get(section)
        return found.get(key, default) if isinstance(found, Mapping) else default

    @property
    def num_epochs(self) -> int:
        """How many epochs it was to train; those that are there, where config.yaml does not say."""
        planned = (as_count(self.setting("train", key, None)) for key in ("stop_after", "epochs"))
        return next((epochs for epochs in planned if epochs), len(self.metrics))

    @property
    def finished(self) -> bool:
        """Whether the last epoch is there."""
        return bool(self.metrics[-1]["epoch"] + 1 >= self.num_epochs)

    @property
    def progress(self) -> str:
        """How far it has come, in words."""
        done = self.metrics[-1]["epoch"] + 1
        return count_of(done, "epoch") if self.finished else f"{done} of {count_of(self.num_epochs, 'epoch')} so far"


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read a run folder.

    Args:
        folder: of the run.
        name: what to call it; the folder's name where None.

    Raises:
        ValueError: it is no run folder, has no finished epoch, is damaged or of a newer schema; one line with the cure.
    """
    environment = _json(folder / "environment.json")
    check_schema(environment, folder / "environment.json")
    metrics, notes = read_lines(folder / "metrics.jsonl")
    scores = _scores(folder)
    gallery = _json(folder / "gallery" / "gallery.json") or None
    if gallery is not None:
        check_schema(gallery, folder / "gallery" / "gallery.json")
    config = _config(folder / "config.yaml")
    record = RunRecord(folder, name or folder.resolve().name, config, environment, metrics, scores, gallery)
    if not config:
        notes.append("config.yaml is missing: settings are not shown")
    if not record.finished:
        notes.append(f"the run has not ended: {record.progress}")
    if scores is None and record.finished:
        notes.append("no scores: scores.parquet, which a run writes when it ends, is not there")
    elif scores is None:
        notes.append("no scores yet: scores.parquet is written when a run ends")
    given = (config, environment, metrics, scores, gallery)
    return RunRecord(folder, record.name, *given, notes=tuple(notes))


def check_schema(facts: Mapping[str, Any], file: Path) -> None:
    """Refuse a file of a newer schema.

    Raises:
        ValueError: it is, or what it says of its schema is no number.
    """
    schema = facts.get("schema", 0)
    if not isinstance(schema, int):
        raise ValueError(f"{file} is of no schema ({schema!r}), which is a whole number: restore the file")
    if schema > RUN_SCHEMA:
        raise ValueError(f"{file} is of schema {schema}, this version reads up to {RUN_SCHEMA}: upgrade rayprune")


def _scores(folder: Path) -> ScoreFile | None:
    file = folder / "scores.parquet"
    if not file.exists():
        return None
    try:
        return read_scores(folder)
    except OSError as error:  # pages that are damaged, under a footer that is not
        raise ValueError(f"{file} can't be read ({one_line(error, 120)}): restore or delete it") from None


def _config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        read = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read ({' '.join(str(error).split())}): restore it") from None
    return read if isinstance(read, Mapping) else {}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{file} is no JSON object: restore or delete it") from None
