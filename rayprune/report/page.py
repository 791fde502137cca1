"""The report: runs, sweeps and comparisons as one page that needs nothing outside itself.

No script, no request: pictures are inline, styles in the page, and every text is escaped on its way in.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from rayprune.report import tables as summary
from rayprune.report.collect import Collected, Group
from rayprune.report.gallery import gallery_of
from rayprune.report.plots.experiments import EXITS_SIZE, draw_evaluations, read_exits
from rayprune.report.plots.runs import Plot, curve_plots, legend, pruning_plot, seconds_plot
from rayprune.report.plots.samples import sample_plots
from rayprune.report.plots.style import DARK_SERIES, GRID, INK, LINES, MUTED, SERIES, save_png, svg
from rayprune.report.read import RunRecord

_LINES = dict(zip(LINES, ("solid", "dashed", "dotted", "dashed"), strict=True))  # in the words of CSS


@dataclass(frozen=True)
class Section:
    """Some plots of the runs under one heading.

    Attributes:
        title: the heading.
        plots: below it.
        text: before them, or "".
        missing: sentences on what can't be shown.
        colours: whether its plots have a colour a run.
        single: whether each plot has a row of its own.
    """

    title: str
    plots: Sequence[Plot]
    text: str = ""
    missing: Sequence[str] = field(default_factory=tuple)
    colours: bool = True
    single: bool = False


def sections_of(runs: Sequence[RunRecord]) -> list[Section]:
    """Return all plots of some runs, in the order of the page.

    Raises:
        ValueError: an evaluation of exits is damaged.
    """
    if not runs:
        return []
    drawn, missing = sample_plots(runs)
    text = "Solid: on the validation part. Thin dashes: on the samples trained on, in their own epoch."
    sections = [
        Section("Loss and accuracy", curve_plots(runs), text),
        Section("Pruning and its cost", [pruning_plot(runs), seconds_plot(runs)]),
        Section("Samples", drawn, missing=missing),
    ]
    evaluated = [(run, tables) for run in runs if (tables := read_exits(run.folder))]
    if evaluated:
        plots = [
            Plot(
                f"exits{number or ''}",
                run.name,
                partial(draw_evaluations, tables, run.name),
                EXITS_SIZE,
                runs=False,
                pan=True,
            )
            for number, (run, tables) in enumerate(evaluated)
        ]
        sections.append(Section("Early exits: accuracy against multiply-adds", plots, colours=False, single=True))
    return sections


def render(found: Collected) -> str:
    """Return the page as HTML."""
    runs = found.runs
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html.j2").read_text("utf-8"))
    shown = [
        {
            "name": run.name,
            "colour": number % len(SERIES),
            "line": _LINES[LINES[number // len(SERIES) % len(LINES)]],
            "facts": summary.facts(run),
            "epochs": summary.epochs_table(run),
        }
        for number, run in enumerate(runs)
    ]
    return template.render(
        title=found.title,
        lead=_lead(found),
        groups=[_group(group) for group in found.groups],
        runs=shown,
        runs_title="Runs" if len(runs) > 1 else "Result",
        runs_text=found.runs_text,
        runs_table=summary.runs_table(runs),
        left_out=found.left_out,
        notes=_notes(runs),
        gallery_note=found.gallery_note,
        sections=[
            {
                "title": section.title,
                "text": section.text,
                "missing": section.missing,
                "legend": len(runs) > 1 and section.colours,
                "single": section.single,
                "plots": [_shown(plot) for plot in section.plots],
            }
            for section in sections_of(runs)
        ],
        galleries=[gallery for run in runs if (gallery := gallery_of(run)) is not None],
        light={"ink": INK, "muted": MUTED, "grid": GRID, "series": SERIES},
        dark={"series": DARK_SERIES},
        footer=f"Written by rayprune {metadata.version('rayprune')} on {datetime.date.today().isoformat()}.",
    )


def write_pngs(found: Collected, folder: Path) -> list[Path]:
    """Write every plot of a report as a PNG file; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = found.runs
    plots = [plot for group in found.groups for plot in group.plots]
    plots += [plot for section in sections_of(runs) for plot in section.plots]
    return [save_png(partial(_alone, plot, runs), plot.size, folder / f"{plot.key}.png") for plot in plots]


def _alone(plot: Plot, runs: Sequence[RunRecord], figure: Figure) -> None:
    plot.draw(figure)
    if not figure.axes[0].get_title():
        figure.axes[0].set_title(plot.title)
    if plot.runs and len(runs) > 1:
        legend(figure, runs)


def _shown(plot: Plot) -> dict[str, Any]:
    # The only text that is not escaped here: matplotlib escapes what it writes into an SVG.
    picture = svg(plot.draw, plot.size, plot.key.replace("_", ""))
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(plot.title)}"', 1)
    return {"title": plot.title, "svg": Markup(picture), "note": plot.note, "pan": plot.pan}


def _group(group: Group) -> dict[str, Any]:
    return {
        "title": f"{group.kind.capitalize()} {group.name}",
        "verdict": group.verdict,
        "notes": group.notes,
        "plots": [_shown(plot) for plot in group.plots],
        "table": group.table,
        "table_title": "All arms" if group.kind == "comparison" else "All trials",
        "explanation": group.explanation,
    }


def _lead(found: Collected) -> str:
    """Return what the page shows and what that was trained on, each group by its own runs."""
    parts = [(f"a {group.kind}", _trained(group.runs)) for group in found.groups]
    if found.named:
        runs = found.runs
        count = f"{len(runs)} runs" if len(runs) > 1 else f"{runs[0].setting('method', 'name')}, {runs[0].progress}"
        parts.append((f"a run of {count}" if len(runs) == 1 and found.groups else count, _trained(runs)))
    together: dict[str, list[str]] = {}
    for what, trained in parts:
        together.setdefault(trained, []).append(what)
    return "; ".join(f"{' and '.join(whats)}{trained}" for trained, whats in together.items())


def _trained(runs: Sequence[RunRecord]) -> str:
    data = sorted({str(run.setting("data", "source")) for run in runs})
    models = sorted({str(run.setting("model", "name")) for run in runs})
    return f" on {', '.join(data)}, {', '.join(models)}" if runs else ""


def _notes(runs: Sequence[RunRecord]) -> list[str]:
    return [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
