"""One look for all plots, drawn once and shown twice: as SVG that follows the page's theme, or as PNG on white.

Figures are drawn in the colours of the light theme. In the SVG each becomes a CSS variable, so that the same picture
is legible on a dark page; text stays text, in the page's own font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1c2330", "#566070", "#d9dde3", "#ffffff"
# The light theme's, then the dark theme's: the same hues, each with a contrast of 3 and more to its page.
SERIES = ("#0b63a8", "#c4500a", "#00795a", "#a8487e", "#946400", "#5b4fc4", "#4a525e", "#6a6f00")
DARK_SERIES = ("#6cb6ff", "#ff9d5c", "#4fd1a5", "#f29ac4", "#e8bd4f", "#b3a8ff", "#c3cad4", "#cfd06a")
LINES = ("-", "--", ":", "-.")
_VARIABLES = {
    **{colour: f"var(--s{number})" for number, colour in enumerate(SERIES)},
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
Draw = Callable[[Figure], None]


def series(number: int) -> tuple[str, str]:
    """Return the colour and the line of the n-th run of a plot; from the ninth on the lines differ."""
    return SERIES[number % len(SERIES)], LINES[number // len(SERIES) % len(LINES)]


def svg(draw: Draw, size: tuple[float, float], key: str) -> str:
    """Return a figure as an `<svg>` element for a page.

    Args:
        draw: fills an empty figure.
        size: of it, width and height in inches.
        key: unique on the page: letters and digits.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": key}):
        stream = io.StringIO()
        _save(draw, size, stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # A style inside an SVG holds for the whole page: the page has its own for all of them.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{key}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return text.strip()


def save_png(draw: Draw, size: tuple[float, float], file: Path, dpi: int = 150) -> Path:
    """Write a figure as a PNG file on white, whole or not at all; return the file."""
    partial = file.with_name(f"{file.name}.partial")
    with matplotlib.rc_context(_STYLE):
        _save(draw, size, partial, dpi=dpi, format="png", facecolor=PAPER)
    return partial.replace(file)


def _save(draw: Draw, size: tuple[float, float], target: Any, **options: Any) -> None:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Names may be in any script: in an SVG the page's fonts have it, and for a PNG nothing can be done about it.
        warnings.filterwarnings("ignore", message=r"(?s)(Glyph \d+|Matplotlib currently does not support)")
        draw(figure)
        figure.savefig(target, **options)
