"""Plots of a sweep, out of its results.parquet."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rayprune.overrides import read_yaml
from rayprune.report.cells import short
from rayprune.report.drawing import INK, MUTED, SERIES, Draw, save_png
from rayprune.report.swept import read_results

SIZE = (8.0, 5.0)
_MARKS = "osD^vPX*"
_MOST_NAMED = 8


def plot_pareto(folder: Path) -> Path:
    """Draw each finished trial's accuracy against its compute, with the Pareto front; return pareto.png.

    Args:
        folder: of a sweep, with results.parquet.

    Raises:
        ValueError: no trial has an accuracy.
    """
    table, keys = read_results(folder / "results.parquet")
    draw = pareto(table, keys, folder.resolve().name)
    if draw is None:
        raise ValueError(f"{folder}: no trial has an accuracy to plot")
    return save_png(draw, SIZE, folder / "pareto.png")


def pareto(table: pd.DataFrame, keys: list[str], title: str) -> Draw | None:
    """Return what draws a sweep's plot, see `plot_pareto`; None where no trial has an accuracy.

    Trials that were stopped are drawn hollow. The cost axis is the share of N samples in every epoch, or FLOPs where
    trials of the sweep have different lengths or networks.
    """
    table = table[table["val_accuracy"].notna() & table["status"].isin(["finished", "stopped"])]
    return None if table.empty else partial(_draw, table, keys, title)


def _draw(table: pd.DataFrame, keys: list[str], title: str, figure: Figure) -> None:
    finished = table[table["status"] == "finished"]
    cost, scale = "compute_share", 100.0
    if finished["flops"].notna().any():
        each = (finished["flops"] / finished["compute"]).round()
        if finished["epochs"].nunique() > 1 or each.nunique() > 1:
            cost, scale = "flops", 1.0
    axes = figure.add_subplot()
    _draw_trials(axes, table, keys, cost, scale)
    _draw_front(axes, finished[finished["pareto"]].sort_values(cost), keys, cost, scale)
    unit = "compute, % of N samples in every epoch" if cost == "compute_share" else "FLOPs of training"
    axes.set(xlabel=unit, ylabel="validation accuracy of the last epoch, %", title=title)
    axes.margins(0.08)
    axes.legend(loc="lower right", fontsize=8)


def _draw_trials(axes: Axes, table: pd.DataFrame, keys: list[str], cost: str, scale: float) -> None:
    for number, (name, group) in enumerate(table.groupby(table.apply(_method, axis=1, keys=keys))):
        colour, mark = SERIES[number % len(SERIES)], _MARKS[number % len(_MARKS)]
        for status, faces in (("finished", colour), ("stopped", "none")):
            some = group[group["status"] == status]
            if len(some):
                label = f"{name}" if status == "finished" else f"{name}, stopped early"
                axes.scatter(
                    some[cost] * scale,
                    some["val_accuracy"] * 100,
                    marker=mark,
                    edgecolors=colour,
                    facecolors=faces,
                    label=label,
                    zorder=3,
                )


def _draw_front(axes: Axes, front: pd.DataFrame, keys: list[str], cost: str, scale: float) -> None:
    x, y = front[cost] * scale, front["val_accuracy"] * 100
    axes.step(x, y, where="post", color=MUTED, linewidth=1.2, zorder=1, label="Pareto front")
    axes.scatter(x, y, s=130, facecolors="none", edgecolors=INK, linewidths=1.2, zorder=4)
    # Trials that reached the same at the same cost share a label, a line each.
    labels: dict[tuple[float, float], list[str]] = {}
    for _, row in front.iterrows():
        place = (float(row[cost] * scale), float(row["val_accuracy"] * 100))
        # Of many points only the numbers of their trials have room.
        label = ", ".join(_shown(row[key]) for key in keys) if len(front) <= _MOST_NAMED else row["trial"][:3]
        labels.setdefault(place, []).append(label)
    middle = sum(axes.get_xlim()) / 2
    for place, lines in labels.items():
        # The front rises to the right: below it and above it are the free sides, and the plot's edge is far.
        offset, aligned = ((9, -4), "left") if place[0] < middle else ((-7, 5), "right")
        side = "top" if offset[1] < 0 else "bottom"
        text = "\n".join(lines)
        axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=7, ha=aligned, va=side)


def _method(row: Any, keys: list[str]) -> str:
    """Return what a trial is coloured by: its method and its network, where they were swept."""
    names = []
    for section in ("method", "model"):
        if f"{section}.name" in keys:
            names.append(_shown(row[f"{section}.name"]))
        elif section in keys:
            value = _read(row[section])
            names.append(str(value.get("name")) if isinstance(value, dict) else str(value))
    return short(", ".join(names), 60) or "trials"


def _read(text: Any) -> Any:
    try:
        return read_yaml(str(text))
    except ValueError:
        return text


def _shown(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    text = f"{value:.3g}" if isinstance(value, float) else str(value).strip("{}").replace("schedule: ", "")
    return short(text, 60)
