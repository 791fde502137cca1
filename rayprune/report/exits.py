"""The picture of a network with several exits: accuracy against multiply-adds, each exit alone and leaving early."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype

from rayprune.report.drawing import INK, PAPER, SERIES, save_png

SIZE = (7.0, 4.8)
_ANYTIME, _DYNAMIC = SERIES[1], SERIES[0]
_FOLDER = "exits"
_UNITS = ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3), ("", 1.0))


def draw_exits(run_folder: Path) -> Path:
    """Draw <run>/exits/accuracy_macs.png from anytime.csv and dynamic.csv, or from the one that is there.

    Args:
        run_folder: of a run that was evaluated.

    Raises:
        ValueError: it was not.
    """
    tables = read_exits(run_folder)
    if not tables:
        raise ValueError(f"{run_folder} was not evaluated yet: rayprune evaluate {run_folder}")
    name = run_folder.resolve().name
    return save_png(partial(draw, tables, name), SIZE, run_folder / _FOLDER / "accuracy_macs.png", dpi=130)


def read_exits(run_folder: Path) -> dict[str, pd.DataFrame]:
    """Return the evaluations of a run's exits that are there, by name: anytime, dynamic.

    Raises:
        ValueError: one is damaged.
    """
    tables = {}
    for name, own in (("anytime", "exit"), ("dynamic", "p")):
        file = run_folder / _FOLDER / f"{name}.csv"
        if not file.exists():
            continue
        try:
            table = pd.read_csv(file)
        except ValueError as error:
            raise ValueError(f"{file} is no table ({' '.join(str(error).split())}): evaluate the run again") from None
        if not _is_evaluation(table, own):
            raise ValueError(f"{file} is not what rayprune evaluate writes: evaluate the run again")
        tables[name] = table
    return tables


def _is_evaluation(table: pd.DataFrame, own: str) -> bool:
    if table.empty or not {"macs", "top1", "samples", "checkpoint", own} <= set(table.columns):
        return False
    numbers = table[["macs", "top1", "samples", own]]
    return all(is_numeric_dtype(kind) for kind in numbers.dtypes) and bool(np.isfinite(numbers).all(axis=None))


def draw(tables: Mapping[str, pd.DataFrame], name: str, figure: Figure) -> None:
    """Fill a figure with a run's evaluations, at least one."""
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
    axes.set_title(f"{name}, {first['checkpoint']}", fontsize=10)
    axes.set_xlim(0, most / scale * 1.06)
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)


def _draw_anytime(axes: Axes, table: pd.DataFrame, scale: float) -> None:
    macs, accuracy = table["macs"] / scale, table["top1"] * 100
    label = "all samples at one exit, by its number"
    axes.plot(macs, accuracy, "s--", color=_ANYTIME, markersize=12, linewidth=1.0, label=label, zorder=3, mfc=PAPER)
    for exit_, x, y in zip(table["exit"], macs, accuracy, strict=True):
        # Inside the mark: nothing else is printed there, wherever the curves run.
        axes.annotate(str(exit_), (x, y), fontsize=8, color=INK, ha="center", va="center", zorder=5)


def _draw_dynamic(axes: Axes, table: pd.DataFrame, scale: float) -> None:
    table = table.sort_values("p")
    label = f"leaving early, p = {table['p'].min()} to {table['p'].max()}"
    macs, accuracy = table["macs"] / scale, table["top1"] * 100
    axes.plot(macs, accuracy, "o-", color=_DYNAMIC, markersize=3, linewidth=1.4, label=label, zorder=2)
