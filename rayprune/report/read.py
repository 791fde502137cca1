"""What a run folder says, as far as it has come: settings, the line of each epoch, the scores, the gallery.

A running or half-written run is read too; what is missing or torn becomes a note, which the report prints.

metrics.jsonl as a report reads it: the last line of each epoch, every value of its kind or None.

Whatever comes after the reading may take the kinds for granted: what is odd in a line is shown as missing.

Values out of files, which may be odd or missing, and the texts of a table's cells.

compare.json as a report reads it: whole and of its kinds, or refused in one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayprune.config.yaml import read_yaml
from rayprune.errors import RunFolderError
from rayprune.sources.score_files import ScoreFile, read_scores
from rayprune.sources.storage import one_line

_MOST = 2**53  # of a count: above it a float is another number


def as_number(value: Any) -> float | None:
    """Return a number as a float, None for anything else and for an infinite one.

    >>> as_number(2), as_number("2"), as_number(True), as_number(10**400), as_number(float("inf"))
    (2.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return None if math.isinf(found) else found


def as_count(value: Any) -> int | None:
    """Return a whole number from 0 on, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST else None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping, an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}


def share(value: Any, digits: int = 2) -> str:
    """Return a share as a percentage, – where there is none."""
    return number(value, f".{digits}%")


def number(value: Any, form: str = ".4f") -> str:
    """Return a number as text, – where there is none."""
    found = as_number(value)
    return "–" if found is None or found != found else format(value, form)


def count_of(num: int, word: str) -> str:
    """Return how many there are of a thing, in words.

    >>> count_of(1, "epoch"), count_of(2, "epoch")
    ('1 epoch', '2 epochs')
    """
    return f"{num:,} {word}{'s' * (num != 1)}"


def short(name: str, most: int) -> str:
    """Return a name cut in its middle to at most so many characters."""
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half:]}"


Line = Mapping[str, Any]
_NEEDED = ("epoch", "num_samples", "samples_trained", "pruned_fraction")  # anything else of a line may be missing
_COUNTS = ("num_samples", "samples_trained", "world_size")
_NUMBERS = (
    "pruned_fraction",
    "requested_prune_ratio",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "lr",
    "wall_time",
)
_NUM_QUANTILES = 7


def read_lines(file: Path) -> tuple[list[Line], list[str]]:
    """Return each epoch's last line, in order of epochs, and notes; a torn last line is left out.

    Args:
        file: metrics.jsonl.

    Raises:
        RunFolderError: the file is missing, holds no whole line, or a line before the last is not an epoch's.
    """
    if not file.is_file():
        if (file.parent / "config.yaml").is_file():
            raise RunFolderError(f"{file.parent} has no metrics.jsonl: its first epoch has not ended, try again later")
        raise RunFolderError(f"{file.parent} is no run folder (it has no metrics.jsonl): name one, such as runs/NAME")
    by_epoch: dict[int, Line] = {}
    notes = []
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            by_epoch[record["epoch"]] = record
        elif number < len(lines) or (number == 1 and text.endswith("\n")):
            raise RunFolderError(f"{file}, line {number} is no epoch's record of a run: restore the file")
        else:
            notes.append(f"the last line of metrics.jsonl (line {number}) is torn and was left out")
    if not by_epoch:
        raise RunFolderError(f"{file} holds no finished epoch: try again when the first has ended, or restore the file")
    if lacking := max(by_epoch) + 1 - len(by_epoch):
        notes.append(f"metrics.jsonl has no line of {count_of(lacking, 'epoch')} before the last")
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], notes


def _record(line: str) -> Line | None:
    """Return a line's values; None where it is no epoch's record."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or any(key not in read for key in _NEEDED) or as_count(read["epoch"]) is None:
        return None
    return {
        "epoch": read["epoch"],
        **{key: as_count(read.get(key)) for key in _COUNTS},
        **{key: as_number(read.get(key)) for key in _NUMBERS},
        "seconds": _seconds(read.get("seconds")),
        "seconds_collected": _seconds(read.get("seconds_collected")),
        "selection": _selection(read.get("selection")),
        "score_quantiles": _quantiles(read.get("score_quantiles")),
    }


def _seconds(value: Any) -> dict[str, float]:
    found = {key: as_number(inner) for key, inner in as_mapping(value).items()}
    return {key: seconds for key, seconds in found.items() if seconds is not None and 0 <= seconds < float("inf")}


def _selection(value: Any) -> dict[str, Any]:
    facts = {key: inner for key, inner in as_mapping(value).items() if key not in ("threshold", "class_kept")}
    facts["budget_so_far"] = as_number(facts.get("budget_so_far"))
    if "threshold" in as_mapping(value):
        facts["threshold"] = as_number(value["threshold"])
    kept = as_mapping(value).get("class_kept")
    if isinstance(kept, list) and all(share is None or as_number(share) is not None for share in kept):
        facts["class_kept"] = kept
    return facts


def _quantiles(value: Any) -> dict[str, list[float | None]]:
    return {
        name: [as_number(edge) for edge in edges]
        for name, edges in as_mapping(value).items()
        if isinstance(edges, list) and len(edges) == _NUM_QUANTILES
    }


_CURE = "run the same rayprune compare again"
# Points of accuracy; far beyond what an interval of two seeds can be, and still to be drawn.
_Points = Annotated[float, Field(ge=-1e6, le=1e6)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Difference(_Part):
    mean: _Points
    low: _Points | None = None
    high: _Points | None = None


class _Share(_Part):
    mean: float | None = None


class _Run(_Part):
    folder: str
    accuracy: _Points


class _Arm(_Part):
    name: str
    baseline: str
    accuracy: _Points
    to_full: _Difference
    runs: list[_Run] = Field(min_length=1)
    epochs: list[int] = Field(min_length=1)
    # Figures beside the verdict: older versions did not write all of them.
    accuracy_sd: float | None = None
    worst_class: float | None = None
    samples_trained: float | None = None
    compute: float | None = None
    compute_saved: float | None = None
    flops: float | None = None
    seconds: float | None = None
    seconds_to_full: _Share = _Share()
    matched: str = ""


class _Judged(_Part):
    outcome: str
    sentence: str


class _Verdict(_Part):
    sentence: str


class _Comparison(_Part):
    arms: list[_Arm] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    margin: _Points
    confidence: float
    methods: dict[str, _Judged]
    verdict: _Verdict
    timing: str = "–"
    uneven_seconds: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    notes: list[str] = []


def read_comparison(file: Path) -> dict[str, Any]:
    """Read compare.json; what older versions did not write is None.

    Raises:
        RunFolderError: it is no JSON, or lacks what a comparison says; one line with the cure.
    """
    try:
        found = _Comparison.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise RunFolderError(f"{file} is not what rayprune compare writes ({place}: {first['msg']}): {_CURE}") from None
    except (ValueError, RecursionError):
        raise RunFolderError(f"{file} is no JSON: {_CURE}") from None
    if found.arms[0].baseline != "full":
        raise RunFolderError(f"{file} does not begin with the arm of full training: {_CURE}")
    for arm in found.arms:
        if len(arm.runs) != len(found.seeds):
            raise RunFolderError(f"{file} has {len(arm.runs)} runs of {arm.name} for {len(found.seeds)} seeds: {_CURE}")
    return found.model_dump()


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
        RunFolderError: the folder is not a run's, has no finished epoch, is damaged or of a newer schema.
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
        RunFolderError: it is, or what it says of its schema is no number.
    """
    schema = facts.get("schema", 0)
    if not isinstance(schema, int):
        raise RunFolderError(f"{file} is of no schema ({schema!r}), which is a whole number: restore the file")
    if schema > RUN_SCHEMA:
        raise RunFolderError(f"{file} is of schema {schema}, this version reads up to {RUN_SCHEMA}: upgrade rayprune")


def _scores(folder: Path) -> ScoreFile | None:
    file = folder / "scores.parquet"
    if not file.exists():
        return None
    try:
        return read_scores(folder)
    except OSError as error:  # pages that are damaged, under a footer that is not
        raise RunFolderError(f"{file} can't be read ({one_line(error, 120)}): restore or delete it") from None


def _config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        read = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} can't be read ({' '.join(str(error).split())}): restore it") from None
    return read if isinstance(read, Mapping) else {}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise RunFolderError(f"{file} is no JSON object: restore or delete it") from None
