"""What a run comes to in words and numbers: the rows of the report's tables and of `rayprune show`.

What a comparison says: its table of arms, what its columns mean, its verdicts. Out of compare.json.

The table of a sweep, a row a trial: on a terminal and in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from rayprune.config.experiments import format_value
from rayprune.core.references import closest
from rayprune.errors import RunFolderError
from rayprune.report.plots.runs import facts_of, spent
from rayprune.report.read import RunRecord, as_mapping, number, share
from rayprune.sources.storage import one_line

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
        raise RunFolderError(
            f"{run.folder} has no scores.parquet: a run writes it when it ends, so let the run finish first"
        )
    columns: dict[str, Any] = {"id": run.scores.ids, **run.scores.scores}
    if sort is None:
        sort = next(name for name in columns if name != "id")
    if sort not in columns:
        raise RunFolderError(f"{run.scores.path} has no column {sort!r}: {closest(sort, columns)}")
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


HEADS = ("arm", "accuracy", "to full", "worst class", "epochs", "samples", "compute", "FLOPs", "time", "seconds")


def compare_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row an arm, as many cells as HEADS."""
    return [_row(arm, report) for arm in report["arms"]]


def _row(arm: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if arm["accuracy_sd"] is None else f" ± {arm['accuracy_sd']:.2f}"
    whole, compute = report["arms"][0]["compute"], arm["compute"]
    return (
        arm["name"],
        f"{arm['accuracy']:.2f}{spread}",
        "" if arm["baseline"] == "full" else _difference(arm["to_full"]),
        number(arm["worst_class"], ".2f"),
        "–".join(str(epochs) for epochs in (arm["epochs"][0], arm["epochs"][-1])[: len(arm["epochs"])]),
        number(arm["samples_trained"], ",.0f"),
        share(compute / whole if whole and compute is not None else None, 1),
        number(arm["flops"], ".2e"),
        share(arm["seconds_to_full"]["mean"], 1),
        number(arm["seconds"], ".1f"),
    )


def _difference(found: Mapping[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def explanation(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the columns mean, and what the derived arms were matched to."""
    num = len(report["seeds"])
    interval = f"; [{report['confidence']:.0%} interval of paired seeds]" if num > 1 else ""
    yield f"points of accuracy after the last epoch, mean{' ± sd' * (num > 1)} of {num} seed{'s' * (num > 1)}{interval}"
    yield f"seconds: {report['timing']}; time: their share of full training's, geometric mean over pairs"
    if uneven := report["uneven_seconds"]:
        yield (
            f"an epoch on everything took {uneven[0]:.3g} to {uneven[1]:.3g} s: runs this short vary, or something "
            "else ran on this machine; seconds say little"
        )
    for arm in report["arms"]:
        if arm["matched"]:
            each = " (first seed)" if num > 1 and arm["baseline"].startswith("random") else ""
            yield f"{arm['name']} matches {arm['matched']}{each}"


def verdict_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence a method, and the one on all of them last."""
    if len(report["methods"]) > 1:
        for judged in report["methods"].values():
            yield f"{judged['sentence']}: {judged['outcome']}."
    yield report["verdict"]["sentence"]


Row = Mapping[str, Any]
_CURE = "run the same rayprune sweep again"
_FIGURES = ("epochs", "val_accuracy", "samples_trained", "compute", "compute_share", "flops", "seconds")


def read_results(file: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read results.parquet; return the table and the swept keys. Figures are floats, NaN where there is none.

    Raises:
        ValueError: it is torn, or is not what a sweep writes; one line with the cure.
    """
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise RunFolderError(f"{file} is no Parquet file ({one_line(error, 120)}): {_CURE}") from None
    columns = [str(name) for name in table.columns]
    if lacking := [name for name in ("trial", "status", "pareto", "val_accuracy") if columns.count(name) != 1]:
        raise RunFolderError(f"{file} has no column {lacking[0]!r}: {_CURE}")
    if columns[0] != "trial" or table.empty:
        raise RunFolderError(f"{file} is not what rayprune sweep writes: {_CURE}")
    table = table.reset_index(drop=True)
    for name in ("trial", "status"):
        table[name] = [value if isinstance(value, str) else "–" for value in table[name]]
    table["error"] = table["error"] if "error" in columns else None
    for name in _FIGURES:
        try:
            # Older versions did not write all of them.
            table[name] = table[name].astype("float64") if name in columns else float("nan")
        except (ValueError, TypeError):
            raise RunFolderError(f"{file} has something else than numbers in column {name!r}: {_CURE}") from None
    table["pareto"] = table["pareto"].eq(True) & table["val_accuracy"].notna()
    return table, columns[1 : columns.index("status")]


def by_accuracy(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, the most accurate first, those without an accuracy last."""
    return sorted(rows, key=lambda row: (row["val_accuracy"] is None, -(row["val_accuracy"] or 0.0)))


def sweep_cells(rows: Sequence[Row], keys: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the head and a row a trial, the most accurate first, those of the Pareto front with a star.

    Args:
        rows: as in results.parquet, None where there is no value.
        keys: the swept keys.
    """
    header = ("", *keys, "val acc", "compute", "FLOPs", "samples trained", "epochs", "seconds", "status", "trial")
    cells: list[tuple[str, ...]] = [header]
    for row in by_accuracy(rows):
        cells.append(
            (
                "*" if row["pareto"] else "",
                *("–" if row[key] is None else format_value(row[key]) for key in keys),
                share(row["val_accuracy"]),
                share(row["compute_share"]),
                number(row["flops"], ".2e"),
                number(row["samples_trained"], ",.0f"),
                number(row["epochs"], ".0f"),
                number(row["seconds"], ".1f"),
                row["status"],
                row["trial"],
            )
        )
    return cells
