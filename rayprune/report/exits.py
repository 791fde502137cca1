"""The picture of a network with several exits: accuracy against multiply-adds, each exit alone and leaving early."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_ANYTIME, _DYNAMIC = "#D55E00", "#0072B2"
_FOLDER = "exits"
_UNITS = ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3), ("", 1.0))


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
    figure = Figure(figsize=(8.0, 5.4), layout="constrained")
    axes = figure.add_subplot()
    most = max(float(table["macs"].max()) for table in tables.values())
    unit, scale = next((name, size) for name, size in _UNITS if most >= size or size == 1.0)
    if "dynamic" in tables:
        _draw_dynamic(axes, tables["dynamic"], scale)
    if "anytime" in tables:
        _draw_anytime(axes, tables["anytime"], scale)
    first = next(iter(tables.values())).iloc[0]
    axes.set_xlabel(f"multiply-adds a sample{unit}; where samples leave early, their mean")
    axes.set_ylabel(f"top-1 accuracy on {first['samples']:,} samples, %")
    axes.set_title(f"{run_folder.resolve().name}, {first['checkpoint']}", fontsize=10)
    axes.set_xlim(0, most / scale * 1.06)
    axes.margins(y=0.1)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    partial = folder / "accuracy_macs.png.partial"
    FigureCanvasAgg(figure)
    figure.savefig(partial, dpi=130, format="png")
    return partial.replace(folder / "accuracy_macs.png")


def _there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.csv").exists()


def _draw_anytime(axes: Axes, table: pd.DataFrame, scale: float) -> None:
    macs, accuracy = table["macs"] / scale, table["top1"] * 100
    label = "all samples at one exit, by its number"
    axes.plot(macs, accuracy, "s--", color=_ANYTIME, markersize=11, linewidth=1.0, label=label, zorder=3)
    for exit_, x, y in zip(table["exit"], macs, accuracy, strict=True):
        # Inside the mark: nothing else is printed there, wherever the curves run.
        axes.annotate(str(exit_), (x, y), fontsize=8, color="white", ha="center", va="center", zorder=5)


def _draw_dynamic(axes: Axes, table: pd.DataFrame, scale: float) -> None:
    table = table.sort_values("p")
    label = f"leaving early, p = {table['p'].min()} to {table['p'].max()}"
    macs, accuracy = table["macs"] / scale, table["top1"] * 100
    axes.plot(macs, accuracy, "o-", color=_DYNAMIC, markersize=3, linewidth=1.4, label=label, zorder=2)
