"""What a run comes to in words and numbers: the rows of the report's tables and of `rayprune show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayprune.core.objects import closest
from rayprune.report.curves import facts_of, spent
from rayprune.report.reading import RunRecord

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: names of the columns.
        rows: as many cells each.
        words: how many columns from the left are words; the others are numbers.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Return a row a run: what it reached, what it spent."""
    head = ("run", "method", "val acc", "train loss", "epochs", "pruned", "samples trained", "selection s", "seconds")
    rows = []
    for run in runs:
        last, seconds = run.metrics[-1], spent(run.metrics)
        pruned = float(np.mean([line["pruned_fraction"] for line in run.metrics]))
        rows.append(
            (
                run.name,
                str(run.setting("method", "name")),
                share(last.get("val_accuracy")),
                number(last.get("train_loss")),
                f"{last['epoch'] + 1}/{run.num_epochs}",
                share(pruned, 1),
                f"{last['samples_trained']:,}",
                f"{seconds['select'] + seconds['record'] + seconds['forward_only']:.2f}",
                f"{last.get('wall_time', seconds['epoch']):.1f}",
            )
        )
    return Table(head, rows, words=2)


def facts(run: RunRecord) -> Facts:
    """Return what a run is, name by name."""
    environment = run.environment
    versions = environment.get("versions", {})
    kept = {key: value for key, value in run.config.get("method", {}).items() if key != "name"}
    last = run.metrics[-1]
    found = [
        ("folder", str(run.folder)),
        ("state", f"finished, {run.progress}" if run.finished else run.progress),
        ("data", f"{run.setting('data', 'source')}, {last['num_samples']:,} samples"),
        ("model", str(run.setting("model", "name"))),
        ("method", f"{run.setting('method', 'name')} ({_listed(kept)})" if kept else run.setting("method", "name")),
        ("batch size", str(run.setting("train", "batch_size"))),
        ("seed", str(run.setting("train", "seed"))),
        ("workers", f"{last.get('world_size', '–')}, stream {environment.get('stream', '–')}"),
        ("device", str(environment.get("gpu") or "CPU")),
        (
            "versions",
            ", ".join(f"{name} {versions[name]}" for name in ("rayprune", "torch", "ray") if name in versions),
        ),
    ]
    if budget := facts_of(last).get("budget_so_far"):
        found.append(("kept so far", f"{budget:.1%} of all visits of the whole run"))
    return [(name, str(value)) for name, value in found]


def epochs_table(run: RunRecord) -> Table:
    """Return a row an epoch."""
    head = ("epoch", "asked", "pruned", "train loss", "train acc", "val loss", "val acc", "lr", "seconds")
    rows = [
        (
            str(line["epoch"] + 1),
            share(line.get("requested_prune_ratio"), 1),
            share(line.get("pruned_fraction"), 1),
            number(line.get("train_loss")),
            share(line.get("train_accuracy")),
            number(line.get("val_loss")),
            share(line.get("val_accuracy")),
            number(line.get("lr"), ".2e"),
            number(line.get("seconds", {}).get("epoch"), ".2f"),
        )
        for line in run.metrics
    ]
    return Table(head, rows, words=0)


def samples_table(run: RunRecord, sort: str | None = None, top: int = 20, ascending: bool = False) -> Table:
    """Return the samples with the highest scores.

    Args:
        run: with scores.
        sort: the column to sort by, one of the scores, `times_pruned`, `last_visit` or `id`; the method's own where
            None.
        top: how many.
        ascending: the lowest instead.

    Raises:
        ValueError: the run has no scores, or none of this name.
    """
    if run.scores is None:
        raise ValueError(
            f"{run.folder} has no scores.parquet: a run writes it when it ends, so let the run finish first"
        )
    columns: dict[str, Any] = {"id": run.scores.ids, **run.scores.scores}
    if sort is None:
        sort = next(name for name in columns if name != "id")
    if sort not in columns:
        raise ValueError(f"{run.scores.path} has no column {sort!r}: {closest(sort, columns)}")
    values = np.asarray(columns[sort], dtype=np.int64 if sort == "id" else np.float64)
    # Equal values stay in order of ids; samples without one come last.
    order = np.argsort(values if ascending else -values, kind="stable")[:top]
    names = [name for name in columns if name != "id"]
    labels = run.scores.labels
    rows = []
    for sample in order.tolist():
        cells = [number(float(columns[name][sample]), ".6g") for name in names]
        rows.append((str(sample), "–" if labels is None else str(labels[sample]), *cells))
    return Table(("id", "label", *names), rows, words=0)


def share(value: Any, digits: int = 2) -> str:
    """Return a share as a percentage, – where there is none."""
    return f"{value:.{digits}%}" if isinstance(value, int | float) else "–"


def number(value: Any, form: str = ".4f") -> str:
    """Return a number as text, – where there is none."""
    return format(value, form) if isinstance(value, int | float) and value == value else "–"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, [], {}, ""))
