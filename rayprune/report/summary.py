"""What a run comes to in words and numbers: the rows of the report's tables and of `rayprune show`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayprune.core.objects import closest
from rayprune.report.cells import number, share
from rayprune.report.curves import facts_of, spent
from rayprune.report.lines import as_mapping
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
        pruned = [line["pruned_fraction"] for line in run.metrics if line["pruned_fraction"] is not None]
        whole = seconds["epoch"] if last["wall_time"] is None else last["wall_time"]
        rows.append(
            (
                run.name,
                str(run.setting("method", "name")),
                share(last["val_accuracy"]),
                number(last["train_loss"]),
                f"{last['epoch'] + 1}/{run.num_epochs}",
                share(float(np.mean(pruned)) if pruned else None, 1),
                number(last["samples_trained"], ",.0f"),
                number(sum(seconds[part] for part in ("select", "record", "forward_only")), ".2f"),
                number(whole, ".1f"),
            )
        )
    return Table(head, rows, words=2)


def facts(run: RunRecord) -> Facts:
    """Return what a run is, name by name."""
    environment = run.environment
    versions = as_mapping(environment.get("versions"))
    kept = {key: value for key, value in as_mapping(run.config.get("method")).items() if key != "name"}
    last = run.metrics[-1]
    found = [
        ("folder", str(run.folder)),
        ("state", f"finished, {run.progress}" if run.finished else run.progress),
        ("data", f"{run.setting('data', 'source')}, {number(last['num_samples'], ',.0f')} samples"),
        ("model", str(run.setting("model", "name"))),
        ("method", f"{run.setting('method', 'name')} ({_listed(kept)})" if kept else run.setting("method", "name")),
        ("batch size", str(run.setting("train", "batch_size"))),
        ("seed", str(run.setting("train", "seed"))),
        ("workers", f"{number(last['world_size'], 'd')}, stream {environment.get('stream', '–')}"),
        ("device", str(environment.get("gpu") or "CPU")),
        (
            "versions",
            ", ".join(f"{name} {versions[name]}" for name in ("rayprune", "torch", "ray") if name in versions),
        ),
    ]
    if budget := facts_of(last)["budget_so_far"]:
        found.append(("kept so far", f"{share(budget, 1)} of all visits of the whole run"))
    return [(name, str(value)) for name, value in found]


def epochs_table(run: RunRecord) -> Table:
    """Return a row an epoch."""
    head = ("epoch", "asked", "pruned", "train loss", "train acc", "val loss", "val acc", "lr", "seconds")
    rows = [
        (
            str(line["epoch"] + 1),
            share(line["requested_prune_ratio"], 1),
            share(line["pruned_fraction"], 1),
            number(line["train_loss"]),
            share(line["train_accuracy"]),
            number(line["val_loss"]),
            share(line["val_accuracy"]),
            number(line["lr"], ".2e"),
            number(line["seconds"].get("epoch"), ".2f"),
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


def _listed(settings: Mapping[str, Any]) -> str:
    told = {key: value for key, value in settings.items() if value not in (None, [], {}, "")}
    return ", ".join(
        f"{key} ({_listed(value)})" if isinstance(value, Mapping) else f"{key} {value}" for key, value in told.items()
    )
