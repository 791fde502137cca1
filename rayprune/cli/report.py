"""The command `rayprune report`: runs, sweeps and comparisons as one page, or their plots alone.

The command `rayprune show`: what a run has come to and which samples stand out, in a terminal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rayprune.cli.console import console
from rayprune.errors import ConfigError


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--output", metavar="FILE", help="The page. [default: report.html in the folder, or in the common one]")
@click.option("--png", metavar="DIR", help="Write the plots alone, as PNG files, and no page.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def report(paths: tuple[str, ...], output: str | None, png: str | None) -> None:
    """Show what each PATH holds on one page: the folder of a run, a sweep, a comparison, or of several of them.

    The page needs nothing outside itself. Running runs are shown as far as they are.
    """
    if output and png:
        raise ConfigError("--png writes plots and no page: leave --output out")
    from rayprune.report.collect import collect

    folders = [Path(path).expanduser() for path in paths]
    found = collect(folders)
    from rayprune.engine.storage.run_folder import write_whole
    from rayprune.report.page import render, write_pngs

    target = Path(png or output or _common(folders) / "report.html").expanduser()
    if not png and target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file, such as --output {target}/report.html")
    if not png and target.exists() and not target.is_file():  # a device or a pipe, which the page would replace
        raise ConfigError(f"{target} is no regular file: name another by --output")
    try:
        if png:
            for file in write_pngs(found, target):
                console.print(str(file), highlight=False, markup=False)
            return
        text = render(found)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        raise ConfigError(
            f"{target} can't be written ({error.strerror}): name another place by --output or --png"
        ) from None
    for note in found.notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    if found.gallery_note:
        console.print(found.gallery_note, style="dim", highlight=False, markup=False)
    console.print(f"report: {target}", highlight=False, markup=False)


def _common(folders: list[Path]) -> Path:
    """Return the folder, or the nearest one that all are in."""
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.absolute() for folder in folders]))


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--sort", metavar="SCORE", help="The column of scores.parquet to go by. [default: the first]")
@click.option("--top", default=20, show_default=True, type=click.IntRange(min=1), metavar="N", help="How many samples.")
@click.option("--ascending", is_flag=True, help="The lowest first.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def show(run: str, sort: str | None, top: int, ascending: bool) -> None:
    """Print what RUN, the folder of a run, has come to: its facts, its epochs, and its samples by score."""
    from rayprune.report.read import read_run
    from rayprune.report.tables import epochs_table, facts, samples_table

    record = read_run(Path(run).expanduser())
    samples = None if record.scores is None and sort is None else samples_table(record, sort, top, ascending)
    for name, value in facts(record):
        console.print(f"{name:<12} {value}", highlight=False, markup=False)
    for note in record.notes:
        console.print(note, style="yellow", highlight=False, markup=False)
    for table in (epochs_table(record), samples):
        if table is not None:
            console.print()
            for number, line in enumerate(_lines(table)):
                console.print(line, style="bold" if number == 0 else None, highlight=False, markup=False)


def _lines(table: Any) -> Iterator[str]:
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
