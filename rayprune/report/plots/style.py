"""The style of all plots, and how they become SVG for the page or PNG files.

Plots are drawn in the colors of the light theme. In SVG each color becomes a CSS variable, so that a dark page can
change it, and text stays text in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from rayprune.paths import replace_file

INK, MUTED, GRID, PAPER = "#1c2330", "#566070", "#d9dde3", "#ffffff"
# Okabe and Ito's palette for color-blind readers (Color Universal Design, 2008): the colors with a contrast of at least
# 3 to a white page, and to a dark one. Further series have other lines, markers and hatches.
# Black is not quite black, as matplotlib leaves black out of an SVG, where the page could not replace it.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#111111")
DARK_SERIES = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#f0e442")
PAPER_DARK = "#1a1f27"
_DECADES = 100.0  # ratio from which an axis is logarithmic


@dataclass(frozen=True)
class Look:
    """How a series is drawn: its color, and a line, a marker and a hatch that change when the colors are used up."""

    color: str
    line: str
    marker: str
    hatch: str


_LINES = (("-", "o", ""), ("--", "s", "////"), ("-.", "^", "...."))
_VARIABLES = {
    **{color: f"var(--s{number})" for number, color in enumerate(SERIES)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
}
T = TypeVar("T")


@dataclass(frozen=True)
class Plot:
    """A plot and its texts on the page.

    Attributes:
        key: name of its PNG file; unique in a report.
        title: its heading.
        draw: fills the axes.
        size: width and height in inches.
        note: a sentence below it, or "".
        by_run: whether each run has its own color, so that a legend of the runs is needed.
        scrolls: whether it is too dense for the width of a phone and scrolls there.
    """

    key: str
    title: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.4, 2.9)
    note: str = ""
    by_run: bool = True
    scrolls: bool = False


def look_of(number: int) -> Look:
    """Return the look of a series by its number."""
    line, marker, hatch = _LINES[number // len(SERIES) % len(_LINES)]
    return Look(SERIES[number % len(SERIES)], line, marker, hatch)


def with_looks(runs: Iterable[T]) -> Iterator[tuple[T, Look]]:
    """Yield each run with its look."""
    for number, run in enumerate(runs):
        yield run, look_of(number)


def spans_decades(*values: NDArray[np.float64]) -> bool:
    """Return whether values of at least 0 span more than two decades, so that an axis should be logarithmic.

    >>> spans_decades(np.array([0.0, 0.001, 2.0])), spans_decades(np.array([0.1, 2.0]), np.array([5.0]))
    (True, False)
    """
    pooled = np.concatenate([np.empty(0), *values])
    positive = pooled[np.isfinite(pooled) & (pooled > 0)]
    return bool(positive.size and not (pooled < 0).any() and positive.max() > _DECADES * positive.min())


def value_axis(axes: Axes, label: str, values: Sequence[NDArray[np.float64]]) -> None:
    """Label the y-axis, and make it logarithmic if the values span decades."""
    logarithmic = spans_decades(*values)
    axes.set_ylabel(f"{label}, logarithmic" if logarithmic else label)
    if logarithmic:
        log_axis(axes, "y")


def log_axis(axes: Axes, side: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers at the decades."""
    axes.set(**{f"{side}scale": "log"})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(numticks=7))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))  # matplotlib's default formatter writes math text
    axis.set_minor_formatter(NullFormatter())


def count_axis(axes: Axes, label: str = "epoch") -> None:
    """Let the x-axis count epochs or anything else in whole numbers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def figure_of(axes: Axes) -> Figure:
    """Return the figure of some axes, for a legend outside of them."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


@contextmanager
def _styled(**settings: Any) -> Iterator[None]:
    """Draw in our style alone: a matplotlibrc in the current folder, which may be anyone's, could even call LaTeX."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | settings)
        yield


def svg(plot: Plot) -> str:
    """Return a plot as an `<svg>` element for a page."""
    key = plot.key.replace("_", "")
    with _styled(**{"svg.hashsalt": key}):
        stream = io.StringIO()
        _save(plot, stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # A style inside an SVG applies to the whole page, which has its own for all of them.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    # Ids must be unique on the page.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text.strip()


def save_png(plot: Plot, file: Path, dpi: int = 150) -> Path:
    """Write a plot atomically as a PNG file on white; return the file."""
    with replace_file(file) as partial, _styled():
        _save(plot, partial, dpi=dpi, format="png", facecolor=PAPER)
    return file


def _save(plot: Plot, target: Any, **options: Any) -> None:
    figure = Figure(figsize=plot.size, layout="constrained")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Names may be in any script: the fonts of a page can show them, and a PNG shows boxes.
        warnings.filterwarnings("ignore", message=r"(?s)(Glyph \d+|Matplotlib currently does not support)")
        plot.draw(figure.add_subplot())
        figure.savefig(target, **options)
