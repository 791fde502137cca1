"""The picture of a network with several exits: accuracy against multiply-adds, each exit alone and leaving early."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_ANYTIME, _DYNAMIC = "#D55E00", "#0072B2"
_FOLDER = "exits"


def draw_exits(run_folder: Path) -> Path:
    """Draw <run>/exits/accuracy_macs.png from anytime.csv and dynamic.csv, or from the one that is there.

    Args:
        run_folder: of a run that was evaluated.

    Raises:
        ValueError: it was not.
    """
    folder = run_folder / _FOLDER
    tables = {name: pd.read_csv(folder / f"{name}.csv") for name in ("anytime", "dynamic") if _there(folder, name)}
    if not tables:
        raise ValueError(f"{run_folder} was not evaluated yet: rayprune evaluate {run_folder}")
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    if "dynamic" in tables:
        _draw_dynamic(axes, tables["dynamic"])
    if "anytime" in tables:
        _draw_anytime(axes, tables["anytime"])
    first = next(iter(tables.values())).iloc[0]
    axes.set_xlabel("multiply-adds a sample, millions (mean, where samples leave early)")
    axes.set_ylabel(f"top-1 accuracy on {first['samples']:,} samples, %")
    axes.set_title(f"{run_folder.resolve().name}, {first['checkpoint']}", fontsize=10)
    axes.set_xlim(left=0)
    axes.margins(y=0.1)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)
    partial = folder / "accuracy_macs.png.partial"
    FigureCanvasAgg(figure)
    figure.savefig(partial, dpi=130, format="png")
    return partial.replace(folder / "accuracy_macs.png")


def _there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.csv").exists()


def _draw_anytime(axes: Axes, table: pd.DataFrame) -> None:
    macs, accuracy = table["macs"] / 1e6, table["top1"] * 100
    axes.plot(
        macs, accuracy, "s--", color=_ANYTIME, markersize=6, linewidth=1.0, label="all samples to one exit", zorder=3
    )
    for exit_, x, y in zip(table["exit"], macs, accuracy, strict=True):
        # Below and to the right: the curve of samples that leave early runs above.
        axes.annotate(f"exit {exit_}", (x, y), xytext=(6, -12), textcoords="offset points", fontsize=8, color=_ANYTIME)


def _draw_dynamic(axes: Axes, table: pd.DataFrame) -> None:
    table = table.sort_values("p")
    label = f"leaving early, p = {table['p'].min()}…{table['p'].max()}"
    axes.plot(
        table["macs"] / 1e6,
        table["top1"] * 100,
        "o-",
        color=_DYNAMIC,
        markersize=3,
        linewidth=1.4,
        label=label,
        zorder=4,
    )
