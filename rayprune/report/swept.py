"""The table of a sweep, a row a trial: on a terminal and in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayprune.config_trials import shown_value

Row = Mapping[str, Any]


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
        trained = "–" if row["samples_trained"] is None else f"{row['samples_trained']:,}"
        seconds = "–" if row["seconds"] is None else f"{row['seconds']:.1f}"
        cells.append(
            (
                "*" if row["pareto"] else "",
                *(shown_value(row[key]) for key in keys),
                _share(row["val_accuracy"]),
                _share(row["compute_share"]),
                "–" if row["flops"] is None else f"{row['flops']:.2e}",
                trained,
                str(row["epochs"] or "–"),
                seconds,
                row["status"],
                row["trial"],
            )
        )
    return cells


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
