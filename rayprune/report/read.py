"""Read the files of runs, sweeps and comparisons, finished or not, and check them.

In the metrics of a run, an invalid or missing value becomes None. A missing file becomes a note, so that a running run
can be shown. A file that cannot be used is refused in one line with the cure. Later code relies on the types.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pandas.api.types import is_numeric_dtype
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from rayprune.config.yaml import read_yaml
from rayprune.errors import RunFolderError, one_line
from rayprune.report.text import count_of
from rayprune.sources.tables.scores import ScoreFile, read_scores

if TYPE_CHECKING:
    from rayprune.report.audit import Audit
    from rayprune.report.gallery import Gallery

OWN_LOOP = "own loop"  # the model in config.yaml of a loop of the user's own
RUN_SCHEMA = 1  # the newest environment.json and gallery.json that this version reads


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The contents of a run folder.

    Attributes:
        folder: the run folder.
        name: label of the run among others.
        config: config.yaml; empty if it is missing.
        environment: environment.json; empty if it is missing.
        metrics: the newest line of each epoch, in order; at least one.
        scores: scores.parquet; None until the run has finished.
        notes: what is missing or damaged, a sentence each.
        gallery: its notable samples; read for a page only.
        audit: the audit of its data; read for a page only.
        exits: name → evaluation of its exits; read for a page only.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[EpochMetrics]
    scores: ScoreFile | None = None
    notes: Sequence[str] = ()
    gallery: Gallery | None = None
    audit: Audit | None = None
    exits: Mapping[str, pd.DataFrame] = field(default_factory=dict)

    def setting(self, section: str, key: str) -> Any:
        """Return a value of config.yaml, or – if it is missing."""
        return as_mapping(self.config.get(section)).get(key, "–")

    def seconds(self, *parts: str) -> float:
        """Return the seconds of some parts in all epochs, including those of a separate scoring run."""
        all_seconds = [*(line.seconds for line in self.metrics), self.metrics[-1].seconds_collected]
        return sum(seconds.get(part) or 0.0 for seconds in all_seconds for part in parts)

    @property
    def training_seconds(self) -> float:
        """Training seconds of all epochs, including those of a separate scoring run."""
        return self.seconds("epoch") - self.seconds("validate")

    @property
    def saved(self) -> float | None:
        """Fraction of the sample visits of full training over the same epochs that was saved; negative if it took more.

        A scoring run counts. Rows that a method skipped inside batches are saved, although a forward pass scored them.
        Rows that `last_batch: drop` leaves out are not saved.
        """
        last, kept = self.metrics[-1], [line.kept for line in self.metrics]
        others = (last.samples_collected or 0) - (last.samples_skipped or 0)
        visits = None if None in kept else sum(count or 0 for count in kept) + others
        if len(self.metrics) <= last.epoch:  # without lost lines, the sum of kept samples is incomplete
            visits = last.samples_trained
        return None if visits is None or not self.full_visits else 1.0 - visits / self.full_visits

    @property
    def compute_share(self) -> float | None:
        """Compute as a fraction of training on all N samples in the same epochs, without padding."""
        compute = self.metrics[-1].compute
        return None if compute is None or not self.full_visits else compute / self.full_visits

    @property
    def full_visits(self) -> int:
        """Sample visits of full training over the epochs so far; 0 if unknown."""
        return (self.metrics[-1].num_samples or 0) * (self.metrics[-1].epoch + 1)

    @property
    def is_own_loop(self) -> bool:
        """Whether a loop of the user's own wrote the folder."""
        return bool(self.setting("model", "name") == OWN_LOOP)

    @property
    def num_epochs(self) -> int:
        """Planned epochs; the finished ones if config.yaml has no valid number."""
        planned = (self.setting("train", key) for key in ("stop_after", "epochs"))
        return next((epochs for epochs in planned if type(epochs) is int and epochs > 0), len(self.metrics))

    @property
    def finished(self) -> bool:
        """Whether the last planned epoch has ended."""
        return self.metrics[-1].epoch + 1 >= self.num_epochs

    @property
    def scores_cure(self) -> str:
        """How to get the scores.parquet that the run lacks."""
        if self.finished and not self.is_own_loop:
            return "run the same command again (rayprune train), which writes it from the last checkpoint"
        return "a run writes it when it finishes"

    @property
    def progress(self) -> str:
        """Number of finished and planned epochs, in words."""
        done = self.metrics[-1].epoch + 1
        return count_of(done, "epoch") if self.finished else f"{done} of {count_of(self.num_epochs, 'epoch')} so far"


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read a run folder without its gallery and evaluations.

    Args:
        folder: the run folder.
        name: label of the run; default: the folder's name.

    Raises:
        RunFolderError: the folder is not a run's, has no finished epoch, is damaged or of a newer schema.
    """
    environment = read_json(folder / "environment.json")
    metrics, notes = read_metrics(folder / "metrics.jsonl")
    config = _read_config(folder / "config.yaml")
    run = RunRecord(folder, name or folder.resolve().name, config, environment, metrics, _read_scores(folder))
    if not config:
        notes.append("config.yaml is missing: settings are not shown")
    if not run.finished:
        notes.append(f"the run has not finished: {run.progress}")
    if run.scores is None:
        state = "no scores: scores.parquet is missing" if run.finished else "no scores yet"
        notes.append(f"{state}; {run.scores_cure}")
    return replace(run, notes=tuple(notes))


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of a run; {} if the file is missing.

    Raises:
        RunFolderError: it is not a JSON object, or of a newer schema.
    """
    if not file.is_file():
        return {}
    try:
        content = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError, RecursionError):
        raise RunFolderError(f"{file} is not a JSON object: restore or delete it") from None
    schema = content.get("schema", 0)
    if not isinstance(schema, int):
        raise RunFolderError(f"{file} has the schema {schema!r}, which is not a whole number: restore the file")
    if schema > RUN_SCHEMA:
        raise RunFolderError(f"{file} has schema {schema}, this version reads up to {RUN_SCHEMA}: upgrade rayprune")
    return content


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, or an empty one for any other value."""
    return value if isinstance(value, Mapping) else {}


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        return as_mapping(read_yaml(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} can't be read ({one_line(error)}): restore it") from None


def _read_scores(folder: Path) -> ScoreFile | None:
    file = folder / "scores.parquet"
    try:
        return read_scores(folder) if file.exists() else None
    except OSError as error:  # damaged pages below a sound footer
        raise RunFolderError(f"{file} can't be read ({one_line(error)}): restore or delete it") from None


def _otherwise(default: Any) -> WrapValidator:
    """Replace an invalid value by the default."""

    def validate_or_replace(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            return validate(default)

    return WrapValidator(validate_or_replace)


Number = Annotated[float | None, Field(allow_inf_nan=False), _otherwise(None)]
Count = Annotated[int | None, Field(ge=0, lt=2**53), _otherwise(None)]
Seconds = Annotated[dict[str, Number], _otherwise({})]
Quantiles = Annotated[list[Number] | None, Field(min_length=7, max_length=7), _otherwise(None)]


class StoredModel(BaseModel):
    """Part of a stored file; fields that only other programs read are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class SelectionFacts(StoredModel):
    """Facts of an epoch's selection: its score threshold, (C,) kept fractions, the fraction kept so far."""

    threshold: Number = None
    class_kept: Annotated[list[Number] | None, _otherwise(None)] = None
    budget_so_far: Number = None


class EpochMetrics(StoredModel):
    """A line of metrics.jsonl; only the first four fields are required."""

    epoch: int = Field(ge=0, lt=2**53)
    num_samples: Count
    samples_trained: Count
    pruned_fraction: Number
    requested_prune_ratio: Number = None
    kept: Count = None
    samples_collected: Count = None
    samples_padded: Count = None
    samples_forwarded: Count = None
    samples_meta: Count = None
    samples_skipped: Count = None
    compute: Number = None
    train_loss: Number = None
    train_accuracy: Number = None
    val_loss: Number = None
    val_accuracy: Number = None
    lr: Number = None
    world_size: Count = None
    wall_time: Number = None
    seconds: Seconds = {}
    seconds_collected: Seconds = {}
    selection: Annotated[SelectionFacts, _otherwise({})] = SelectionFacts()
    score_quantiles: Annotated[dict[str, Quantiles], _otherwise({})] = {}


def read_metrics(file: Path) -> tuple[list[EpochMetrics], list[str]]:
    """Return the newest line of each epoch, in order, and notes; an incomplete last line is left out.

    Args:
        file: metrics.jsonl.

    Raises:
        RunFolderError: the file is missing or has no complete line, or a line before the last is not an epoch's.
    """
    if not file.is_file():
        if (file.parent / "config.yaml").is_file():
            raise RunFolderError(f"{file.parent} has no metrics.jsonl: its first epoch has not ended, try again later")
        raise RunFolderError(f"{file.parent} is not a run folder (no metrics.jsonl): name one, such as runs/NAME")
    by_epoch: dict[int, EpochMetrics] = {}
    notes = []
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = EpochMetrics.model_validate_json(line)
            by_epoch[record.epoch] = record
        except ValidationError:
            if number < len(lines) or (number == 1 and text.endswith("\n")):
                raise RunFolderError(f"{file}, line {number} is not an epoch of a run: restore the file") from None
            notes.append(f"the last line of metrics.jsonl (line {number}) is torn and was left out")
    if not by_epoch:
        raise RunFolderError(f"{file} has no finished epoch: try again when the first has ended, or restore the file")
    if num_missing := max(by_epoch) + 1 - len(by_epoch):
        notes.append(f"metrics.jsonl lacks {count_of(num_missing, 'epoch')} before the last")
    return [by_epoch[epoch] for epoch in sorted(by_epoch)], notes


# Points of accuracy, within limits that no real interval of two seeds reaches and that can be drawn.
Points = Annotated[float, Field(ge=-1e6, le=1e6)]


class Difference(StoredModel):
    """A paired difference of an arm to full training, with its interval if there are several seeds."""

    mean: Points
    low: Points | None
    high: Points | None


class Ratio(StoredModel):
    """A paired ratio of an arm to full training; the interval of two seeds with uneven times has no limits."""

    mean: Points
    low: float | None
    high: float | None


class ArmRun(StoredModel):
    """One run of an arm."""

    folder: str
    accuracy: Points


class Arm(StoredModel):
    """A way to train, over all seeds."""

    name: str
    baseline: str
    matched: str
    accuracy: Points
    accuracy_sd: float | None
    worst_class: float
    to_full: Difference
    sample_share: float | None
    epochs: list[int] = Field(min_length=1)
    samples_trained: float
    compute_saved: float
    flops: float
    learning_rate: float
    mean_step_scale: float
    seconds: float
    seconds_to_full: Ratio
    runs: list[ArmRun] = Field(min_length=1)


class SelfCheck(StoredModel):
    """The difference of two arms that should agree; `agrees` is None where the runs can't tell."""

    arms: list[str] = Field(min_length=2, max_length=2)
    difference: Difference
    agrees: bool | None


class Verdict(StoredModel):
    """A conclusion on one method or on all."""

    outcome: str
    sentence: str


class Comparison(StoredModel):
    """compare.json; the first arm is full training."""

    arms: list[Arm] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    margin: Points
    confidence: float
    look: int
    methods: dict[str, Verdict]
    self_checks: list[SelfCheck]
    verdict: Verdict
    timing: str
    uneven_seconds: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    notes: list[str]


def read_comparison(file: Path) -> Comparison:
    """Read compare.json.

    Raises:
        RunFolderError: it is not what a comparison writes.
    """
    cure = "run the same rayprune compare again"
    try:
        comparison = Comparison.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise RunFolderError(f"{file} is not what rayprune compare writes ({place}: {first['msg']}): {cure}") from None
    if comparison.arms[0].baseline != "full":
        raise RunFolderError(f"{file} does not begin with the arm of full training: {cure}")
    num_seeds = len(comparison.seeds)
    for arm in comparison.arms:
        if len(arm.runs) != num_seeds:
            raise RunFolderError(f"{file} has {len(arm.runs)} runs of {arm.name} for {num_seeds} seeds: {cure}")
    return comparison


@dataclass(frozen=True, eq=False)
class SweepResults:
    """results.parquet.

    Attributes:
        table: a row per trial; figures are floats, or NaN if missing.
        keys: the swept keys, which are columns of the table.
    """

    table: pd.DataFrame
    keys: list[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The trials as plain values, or None if missing."""
        values = self.table.astype(object)
        records = values.where(values.notna(), None).to_dict("records")
        return [{str(name): value for name, value in record.items()} for record in records]


_FIGURES = ("epochs", "val_accuracy", "samples_trained", "compute", "compute_share", "flops", "seconds")


def read_results(file: Path) -> SweepResults:
    """Read results.parquet.

    Raises:
        RunFolderError: it is not what a sweep writes.
    """
    try:
        with file.open("rb") as stream:
            table = pd.read_parquet(stream).reset_index(drop=True)
        columns = [str(name) for name in table.columns]
        missing = {"trial", "status", "pareto", "error", *_FIGURES} - set(columns)
        if missing or columns[0] != "trial" or table.empty or not table.columns.is_unique:
            raise RunFolderError(f"missing columns: {', '.join(sorted(missing)) or 'none'}; {len(table)} rows")
        table = table.astype({"trial": str, "status": str, **dict.fromkeys(_FIGURES, "float64")})
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        cure = "run the same rayprune sweep again"
        raise RunFolderError(f"{file} is not what rayprune sweep writes ({one_line(error)}): {cure}") from None
    table["pareto"] = table["pareto"].eq(True) & table["val_accuracy"].notna()
    return SweepResults(table, columns[1 : columns.index("status")])


def read_exits(run_folder: Path) -> dict[str, pd.DataFrame]:
    """Return name → table of the evaluations of a run's exits: anytime, dynamic, or none.

    Raises:
        RunFolderError: one is damaged.
    """
    tables = {}
    for name, key in (("anytime", "exit"), ("dynamic", "p")):
        file = run_folder / "exits" / f"{name}.csv"
        if not file.exists():
            continue
        try:
            with file.open("rb") as stream:
                table = pd.read_csv(stream)
            numbers = table[["macs", "top1", "samples", key]]
            sound = "checkpoint" in table and len(table) > 0 and all(map(is_numeric_dtype, numbers.dtypes))
            if not sound or not np.isfinite(numbers).all(axis=None):
                raise RunFolderError("its columns are not those of an evaluation")
        except (ValueError, KeyError) as error:
            cure = "evaluate the run again"
            raise RunFolderError(f"{file} is not what rayprune evaluate writes ({one_line(error)}): {cure}") from None
        tables[name] = table
    return tables
