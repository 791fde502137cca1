"""The report: runs, sweeps and comparisons on one self-contained page, or their plots as PNG files.

The page has no script and makes no request: plots are inline SVG, and every text is escaped.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from rayprune.report import tables
from rayprune.report.collect import Collected
from rayprune.report.differences import from_each_other
from rayprune.report.plots.experiments import exits_plot
from rayprune.report.plots.runs import curve_plots, draw_legend, legend_height, pruning_plot, seconds_plot
from rayprune.report.plots.samples import sample_plots
from rayprune.report.plots.style import (
    DARK_SERIES,
    GRID,
    INK,
    MUTED,
    PAPER,
    PAPER_DARK,
    SERIES,
    Plot,
    save_png,
    svg,
    with_looks,
)
from rayprune.report.read import RunRecord

_DASHES = {"-": "none", "--": "6 3", "-.": "9 3 2 3"}  # of an SVG line


@dataclass(frozen=True)
class Section:
    """Plots of the runs under one heading.

    Attributes:
        title: the heading.
        plots: the plots.
        text: a line before them, or "".
        missing: a sentence on each plot that cannot be drawn.
        wide: whether each plot has its own row.
    """

    title: str
    plots: Sequence[Plot]
    text: str = ""
    missing: Sequence[str] = ()
    wide: bool = False


def render(collected: Collected) -> str:
    """Return the page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = _inline_svg
    template = environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    return template.render(
        report=collected,
        lead=_lead(collected),
        sections=_sections(collected.runs),
        tables=tables,
        legend=[
            (run.name, f"var(--s{SERIES.index(look.color)})", _DASHES[look.line])
            for run, look in with_looks(collected.runs)
        ],
        differences=from_each_other(collected.runs) if len(collected.runs) > 1 else [],
        light={"ink": INK, "muted": MUTED, "grid": GRID, "paper": PAPER, "series": SERIES},
        dark={"paper": PAPER_DARK, "series": DARK_SERIES},
        footer=f"Written by rayprune {metadata.version('rayprune')} on {datetime.date.today().isoformat()}.",
    )


def write_pngs(collected: Collected, folder: Path) -> list[Path]:
    """Write every plot of a report as a PNG file; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = [plot for group in collected.groups for plot in group.plots]
    plots += [plot for section in _sections(collected.runs) for plot in section.plots]
    return [save_png(_alone(plot, collected.runs), folder / f"{plot.key}.png") for plot in plots]


def _sections(runs: Sequence[RunRecord]) -> list[Section]:
    if not runs:
        return []
    plots, missing = sample_plots(runs)
    text = "Solid: validation samples. Dotted: training samples, in the epoch that trained on them."
    sections = [
        Section("Loss and accuracy", curve_plots(runs), text),
        Section("Pruning and its cost", [pruning_plot(runs), seconds_plot(runs)]),
        Section("Samples", plots, missing=missing),
    ]
    evaluated = [run for run in runs if run.exits]
    exits = [exits_plot(run.exits, run.name, f"exits{number or ''}") for number, run in enumerate(evaluated)]
    if exits:
        sections.append(Section("Early exits: accuracy against multiply-adds", exits, wide=True))
    return sections


def _alone(plot: Plot, runs: Sequence[RunRecord]) -> Plot:
    """Return a plot that has its title and, if it needs one, a legend of the runs below it."""
    has_legend = plot.by_run and len(runs) > 1

    def draw(axes: Axes) -> None:
        plot.draw(axes)
        if not axes.get_title():
            axes.set_title(plot.title)
        if has_legend:
            draw_legend(axes, runs)

    width, height = plot.size
    return replace(plot, draw=draw, size=(width, height + legend_height(runs) if has_legend else height))


def _inline_svg(plot: Plot) -> Markup:
    # The only text that the template does not escape: matplotlib escapes the texts of an SVG.
    return Markup(svg(plot).replace("<svg", f'<svg role="img" aria-label="{Markup.escape(plot.title)}"', 1))


def _lead(collected: Collected) -> str:
    """Return a description of the page: its groups and runs with their data and models."""
    parts = [(f"a {group.kind}", _trained_on(group.runs)) for group in collected.groups]
    if collected.named_audits:
        number = len(collected.named_audits)
        parts.append(("a data audit" if number == 1 else f"{number} data audits", ""))
    if runs := collected.named_runs:
        name = f"{runs[0].setting('method', 'name')}, {runs[0].progress}"
        one = f"a run of {name}" if collected.groups or collected.named_audits else name
        parts.append((one if len(runs) == 1 else f"{len(runs)} runs", _trained_on(runs)))
    by_data: dict[str, list[str]] = {}
    for subject, data in parts:
        by_data.setdefault(data, []).append(subject)
    return "; ".join(f"{' and '.join(subjects)}{data}" for data, subjects in by_data.items())


def _trained_on(runs: Sequence[RunRecord]) -> str:
    data = sorted({str(run.setting("data", "source")) for run in runs})
    models = sorted({str(run.setting("model", "name")) for run in runs})
    return f" on {', '.join(data)}, {', '.join(models)}" if runs else ""
