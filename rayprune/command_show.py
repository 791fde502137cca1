"""The command `rayprune show`: what a run has come to and which samples stand out, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

console = Console(soft_wrap=True)


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--sort", metavar="SCORE", help="The column of scores.parquet to go by. [default: the first]")
@click.option("--top", default=20, show_default=True, type=click.IntRange(min=1), metavar="N", help="How many samples.")
@click.option("--ascending", is_flag=True, help="The lowest first.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def show(run: str, sort: str | None, top: int, ascending: bool) -> None:
    """Print what RUN, the folder of a run, has come to: its facts, its epochs, and its samples by score."""
    from rayprune.report.reading import read_run
    from rayprune.report.summary import epochs_table, facts, samples_table

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
