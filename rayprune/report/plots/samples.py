"""Plots of the samples: their scores, how often each was pruned, and what each class was left with.

Shapes: N samples, C classes, E epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from rayprune.report.plots.runs import Plot, facts_of
from rayprune.report.plots.style import series
from rayprune.report.read import Line, RunRecord

_COUNTS = ("last_visit", "times_pruned")
_MOST_SCORES = 4
_BINS = 40


def sample_plots(runs: Sequence[RunRecord]) -> tuple[list[Plot], list[str]]:
    """Return the plots, and a sentence on each that what is stored does not allow."""
    plots: list[Plot] = []
    missing: list[str] = []
    names = list(dict.fromkeys(name for run in runs for name in score_names(run)))
    for number, name in enumerate(names[:_MOST_SCORES]):
        note = "Of all samples, as they stood when the run ended." if number == 0 else ""
        plots.append(Plot(f"score_{number}", f"Distribution of {name}", partial(_draw_score, runs, name), note=note))
    if len(names) > _MOST_SCORES:
        missing.append(f"Not drawn: {', '.join(names[_MOST_SCORES:])} (scores.parquet holds them).")
    if not names:
        missing.append("No distribution of scores: no run here has ended with scores.")
    if any("threshold" in facts_of(line) for run in runs for line in run.metrics):
        note = "The score at which the choice of an epoch was cut."
        plots.append(Plot("threshold", "Score threshold by epoch", partial(_draw_threshold, runs), note=note))
    spreads = list(dict.fromkeys(name for run in runs for line in run.metrics for name in quantiles_of(line)))
    for number, name in enumerate(spreads[:_MOST_SCORES]):
        note = "Median, the middle half of the samples as a band, and dotted where the outer 5 % begin at either end."
        plots.append(Plot(f"spread_{number}", f"{name} over epochs", partial(_draw_spread, runs, name), note=note))
    if any(times_pruned(run) is not None for run in runs):
        note = "0: in every epoch that trained."
        plots.append(Plot("times_pruned", "How often samples were pruned", partial(_draw_times, runs), note=note))
    else:
        missing.append("How often samples were pruned is not known before a run ends.")
    if any(class_kept(run) is not None for run in runs):
        note = "Mean over all epochs; 100 % is a class of which nothing was left out."
        plots.append(Plot("class_balance", "Kept of each class", partial(_draw_classes, runs), note=note))
    else:
        missing.append("No class balance: the runs' metrics hold no kept share of each class.")
    return plots, missing


def quantiles_of(record: Line) -> dict[str, list[float | None]]:
    """Return name → the seven quantiles of a score at the end of an epoch; nothing of a run that does not tell."""
    return dict(record["score_quantiles"])


def score_names(run: RunRecord) -> list[str]:
    """Return the names of a run's scores, the counts left out."""
    return [] if run.scores is None else [name for name in run.scores.scores if name not in _COUNTS]


def times_pruned(run: RunRecord) -> NDArray[np.int64] | None:
    """Return (N,) how often each sample was pruned, or None."""
    if run.scores is None or "times_pruned" not in run.scores.scores:
        return None
    return np.nan_to_num(run.scores.scores["times_pruned"]).astype(np.int64)


def class_kept(run: RunRecord) -> NDArray[np.float64] | None:
    """Return (C,) the mean share kept of each class over the epochs, or None."""
    each = [facts_of(line).get("class_kept") for line in run.metrics]
    rows = [row for row in each if isinstance(row, list) and row]
    if not rows or len({len(row) for row in rows}) > 1:
        return None
    shares_EC = np.array([[np.nan if value is None else value for value in row] for row in rows], dtype=float)
    seen = np.isfinite(shares_EC)
    return np.where(seen, shares_EC, 0.0).sum(0) / np.maximum(seen.sum(0), 1)


def _draw_score(runs: Sequence[RunRecord], name: str, figure: Figure) -> None:
    axes = figure.add_subplot()
    columns = {}
    for number, run in enumerate(runs):
        if name in score_names(run):
            assert run.scores is not None
            column = np.asarray(run.scores.scores[name], dtype=np.float64)
            columns[number] = column[np.isfinite(column)]
    pooled = np.concatenate(list(columns.values()))
    low, high = (pooled.min(), pooled.max()) if pooled.size else (0.0, 1.0)
    # Losses span decades: on a linear axis nearly all of them are in the first bin.
    logarithmic = pooled.size > 0 and low > 0 and np.median(pooled) < high / 20
    if low == high:
        low, high = low - 0.5, high + 0.5
        logarithmic = False
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    for number, column in columns.items():
        colour, line = series(number)
        share = 100.0 * np.histogram(column, edges)[0] / max(column.size, 1)
        axes.stairs(share, edges, color=colour, linestyle=line, linewidth=1.5)
        axes.stairs(share, edges, color=colour, alpha=0.12, fill=True)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # matplotlib's own writes mathematics
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{name}, logarithmic" if logarithmic else name)
    axes.set_ylabel("% of the samples")
    axes.set_ylim(bottom=0)


def _draw_spread(runs: Sequence[RunRecord], name: str, figure: Figure) -> None:
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        known = [(line["epoch"] + 1, quantiles_of(line)[name]) for line in run.metrics if name in quantiles_of(line)]
        if not known:
            continue
        colour, style = series(number)
        epochs = [epoch for epoch, _ in known]
        _, low, first, middle, third, high, _ = np.array([values for _, values in known], dtype=np.float64).T
        axes.fill_between(epochs, first, third, color=colour, alpha=0.15, linewidth=0)
        axes.plot(epochs, middle, style, color=colour, marker="o", markersize=3)
        for edge in (low, high):
            axes.plot(epochs, edge, ":", color=colour, linewidth=0.9)
    axes.set(xlabel="epochs", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_threshold(runs: Sequence[RunRecord], figure: Figure) -> None:
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        colour, line = series(number)
        points = [(record["epoch"] + 1, facts_of(record).get("threshold")) for record in run.metrics]
        known = [(epoch, float(value)) for epoch, value in points if value is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], line, color=colour, marker="o", markersize=3)
    axes.set(xlabel="epochs", ylabel="threshold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_times(runs: Sequence[RunRecord], figure: Figure) -> None:
    axes = figure.add_subplot()
    counted = [(number, times) for number, run in enumerate(runs) if (times := times_pruned(run)) is not None]
    width = 0.84 / len(counted)
    for place, (number, times) in enumerate(counted):
        share = 100.0 * np.bincount(times) / times.size
        offset = (place - (len(counted) - 1) / 2) * width
        axes.bar(np.arange(share.size) + offset, share, width=width, color=series(number)[0])
    axes.set(xlabel="epochs in which a sample was pruned", ylabel="% of the samples")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(-0.6, max([1, *(int(times.max(initial=0)) for _, times in counted)]) + 0.6)
    axes.grid(visible=False, axis="x")


def _draw_classes(runs: Sequence[RunRecord], figure: Figure) -> None:
    axes = figure.add_subplot()
    for number, run in enumerate(runs):
        kept_C = class_kept(run)
        if kept_C is None:
            continue
        colour, line = series(number)
        size = 4.0 if kept_C.size <= 40 else 0.0
        axes.plot(np.arange(kept_C.size), 100 * kept_C, line, color=colour, linewidth=1.2, marker="o", markersize=size)
    axes.set(xlabel="class, by its number", ylabel="kept, %")
    axes.set_ylim(0, 105)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
