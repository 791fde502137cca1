"""Plots of the samples: their scores, how often each was pruned, and the fraction of each class that was kept.

Shapes: N samples, C classes, E epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from rayprune.report.plots.style import PAPER, Look, Plot, count_axis, log_axis, spans_decades, value_axis, with_looks
from rayprune.report.read import RunRecord

_COUNTS = ("last_visit", "times_pruned")
_MAX_SCORES = 4
_BINS = 40
_MAX_BARS = 60  # classes, above which their bars become steps


def sample_plots(runs: Sequence[RunRecord]) -> tuple[list[Plot], list[str]]:
    """Return the plots, and a sentence on each plot that the stored data does not allow."""
    plots: list[Plot] = []
    missing: list[str] = []
    names = list(dict.fromkeys(name for run in runs for name in score_names(run)))
    for number, name in enumerate(names[:_MAX_SCORES]):
        note = "The last score of every sample that has one." if number == 0 else ""
        plots.append(Plot(f"score_{number}", f"Distribution of {name}", partial(_draw_score, runs, name), note=note))
    if len(names) > _MAX_SCORES:
        missing.append(f"Not shown: {', '.join(names[_MAX_SCORES:])} (see scores.parquet).")
    if not names:
        missing.append("No distribution of scores: none of these runs has finished with scores.")
    if any(line.selection.threshold is not None for run in runs for line in run.metrics):
        note = "The score that separates kept from pruned samples."
        plots.append(Plot("threshold", "Score threshold by epoch", partial(_draw_threshold, runs), note=note))
    spreads = list(dict.fromkeys(name for run in runs for line in run.metrics for name in line.score_quantiles))
    for number, name in enumerate(spreads[:_MAX_SCORES]):
        note = "Line: median. Band: 25th to 75th percentile. Dotted: 5th and 95th percentile."
        plots.append(
            Plot(f"spread_{number}", f"Spread of {name} by epoch", partial(_draw_spread, runs, name), note=note)
        )
    if any(times_pruned(run) is not None for run in runs):
        note = "0: trained in every epoch."
        plots.append(Plot("times_pruned", "How often samples were pruned", partial(_draw_times, runs), note=note))
    else:
        missing.append("How often samples were pruned is known when a run finishes.")
    if any(class_kept(run) is not None for run in runs):
        note = "Mean over all epochs; 100 % means that no sample of the class was ever pruned."
        plots.append(Plot("class_balance", "Kept of each class", partial(_draw_classes, runs), note=note))
    else:
        missing.append("No class balance: the metrics of these runs have no kept fraction of each class.")
    return plots, missing


def score_names(run: RunRecord) -> list[str]:
    """Return the names of a run's scores, without the counts."""
    return [] if run.scores is None else [name for name in run.scores.scores if name not in _COUNTS]


def times_pruned(run: RunRecord) -> NDArray[np.int64] | None:
    """Return (N,) how often each sample was pruned, or None."""
    if run.scores is None or "times_pruned" not in run.scores.scores:
        return None
    return np.nan_to_num(run.scores.scores["times_pruned"]).astype(np.int64)


def class_kept(run: RunRecord) -> NDArray[np.float64] | None:
    """Return (C,) the mean kept fraction of each class over the epochs, 0 if unknown; or None."""
    rows = [line.selection.class_kept for line in run.metrics if line.selection.class_kept]
    if not rows or len({len(row) for row in rows}) > 1:
        return None
    shares_EC = np.array(rows, dtype=np.float64)
    known_EC = np.isfinite(shares_EC)
    return np.where(known_EC, shares_EC, 0.0).sum(0) / np.maximum(known_EC.sum(0), 1)


def _draw_score(runs: Sequence[RunRecord], name: str, axes: Axes) -> None:
    columns = []
    for run, look in with_looks(runs):
        if name in score_names(run):
            assert run.scores is not None
            column = np.asarray(run.scores.scores[name], dtype=np.float64)
            columns.append((column[np.isfinite(column)], look))
    pooled = np.concatenate([column for column, _ in columns])
    low, high = (pooled.min(), pooled.max()) if pooled.size else (0.0, 1.0)
    # Losses span orders of magnitude: on a linear axis, nearly all are in the first bin.
    logarithmic = spans_decades(pooled)
    if logarithmic:
        low = pooled[pooled > 0].min()
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    for column, look in columns:
        # A loss of exactly 0 is in the first bin.
        share = 100.0 * np.histogram(column.clip(low), edges)[0] / max(column.size, 1)
        axes.stairs(share, edges, color=look.color, linestyle=look.line, linewidth=1.5)
        axes.stairs(share, edges, color=look.color, alpha=0.12, fill=True)
    if logarithmic:
        log_axis(axes, "x")
    axes.set_xlabel(f"{name}, logarithmic" if logarithmic else name)
    axes.set_ylabel("% of the samples")
    axes.set_ylim(bottom=0)


def _draw_spread(runs: Sequence[RunRecord], name: str, axes: Axes) -> None:
    drawn = []
    for run, look in with_looks(runs):
        rows = {record.epoch + 1: values for record in run.metrics if (values := record.score_quantiles.get(name))}
        if not rows:
            continue
        epochs = list(rows)
        _, low, first, median, third, high, _ = np.array(list(rows.values()), dtype=np.float64).T
        axes.fill_between(epochs, first, third, color=look.color, alpha=0.15, linewidth=0)
        axes.plot(epochs, median, ls=look.line, color=look.color, marker=look.marker, markersize=3)
        for edge in (low, high):
            axes.plot(epochs, edge, ":", color=look.color, linewidth=0.9)
        drawn += [low, high]
    value_axis(axes, name, drawn)
    count_axis(axes)


def _draw_threshold(runs: Sequence[RunRecord], axes: Axes) -> None:
    drawn = []
    for run, look in with_looks(runs):
        cuts = [(record.epoch + 1, record.selection.threshold) for record in run.metrics]
        known = [(epoch, threshold) for epoch, threshold in cuts if threshold is not None]
        thresholds = np.array([threshold for _, threshold in known], dtype=np.float64)
        axes.plot(
            [epoch for epoch, _ in known], thresholds, ls=look.line, color=look.color, marker=look.marker, markersize=3
        )
        drawn.append(thresholds)
    value_axis(axes, "threshold", drawn)
    count_axis(axes)


def _draw_times(runs: Sequence[RunRecord], axes: Axes) -> None:
    counted = [(times, look) for run, look in with_looks(runs) if (times := times_pruned(run)) is not None]
    shares = [(100.0 * np.bincount(times) / times.size, look) for times, look in counted]
    _draw_bars(axes, shares)
    axes.set_ylabel("% of the samples")
    axes.set_xlim(-0.6, max(1, *(int(times.max(initial=0)) for times, _ in counted)) + 0.6)
    count_axis(axes, "epochs in which a sample was pruned")


def _draw_classes(runs: Sequence[RunRecord], axes: Axes) -> None:
    kept = [(100 * kept_C, look) for run, look in with_looks(runs) if (kept_C := class_kept(run)) is not None]
    if max(kept_C.size for kept_C, _ in kept) <= _MAX_BARS:
        _draw_bars(axes, kept)
    else:
        for kept_C, look in kept:
            axes.stairs(kept_C, np.arange(kept_C.size + 1) - 0.5, color=look.color, linestyle=look.line, linewidth=1.0)
    axes.set_ylabel("kept, %")
    axes.set_ylim(0, 105)
    count_axis(axes, "class")


def _draw_bars(axes: Axes, series: Sequence[tuple[NDArray[np.float64], Look]]) -> None:
    """Draw the bars of several series side by side, at 0, 1, 2, …"""
    width = 0.84 / len(series)
    for place, (heights, look) in enumerate(series):
        offset = (place - (len(series) - 1) / 2) * width
        bars = np.arange(heights.size) + offset
        axes.bar(bars, heights, width=width, color=look.color, hatch=look.hatch, edgecolor=PAPER, linewidth=0.3)
    axes.grid(visible=False, axis="x")
