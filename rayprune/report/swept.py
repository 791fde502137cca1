"""The table of a sweep, a row a trial: on a terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from rayprune.config_trials import shown_value
from rayprune.report.cells import number, share
from rayprune.sources.storage import one_line

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
        raise ValueError(f"{file} is no Parquet file ({one_line(error, 120)}): {_CURE}") from None
    columns = [str(name) for name in table.columns]
    if lacking := [name for name in ("trial", "status", "pareto", "val_accuracy") if columns.count(name) != 1]:
        raise ValueError(f"{file} has no column {lacking[0]!r}: {_CURE}")
    if columns[0] != "trial" or table.empty:
        raise ValueError(f"{file} is not what rayprune sweep writes: {_CURE}")
    table = table.reset_index(drop=True)
    for name in ("trial", "status"):
        table[name] = [value if isinstance(value, str) else "–" for value in table[name]]
    table["error"] = table["error"] if "error" in columns else None
    for name in _FIGURES:
        try:
            # Older versions did not write all of them.
            table[name] = table[name].astype("float64") if name in columns else float("nan")
        except (ValueError, TypeError):
            raise ValueError(f"{file} has something else than numbers in column {name!r}: {_CURE}") from None
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
                *("–" if row[key] is None else shown_value(row[key]) for key in keys),
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
