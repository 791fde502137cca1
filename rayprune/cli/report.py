"""The commands `rayprune report`, which writes a page or PNG files, and `rayprune show`, which prints a run."""

from __future__ import annotations

from pathlib import Path

import click

from rayprune.cli.console import debug_option, say, say_table, warn
from rayprune.core.validation import MAX_INT
from rayprune.errors import ConfigError
from rayprune.paths import as_path


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--output", metavar="FILE", help="The page. [default: report.html in the folder, or in the common one]")
@click.option("--png", metavar="DIR", help="Write the plots as PNG files instead of a page.")
@debug_option
def report(paths: tuple[str, ...], output: str | None, png: str | None) -> None:
    """Show every PATH on one page: the folder of a run, a sweep, a comparison, or of several of them.

    The page is self-contained. Runs that are still training are shown up to their last epoch.
    """
    if output and png:
        raise ConfigError("--png writes plots instead of a page: leave --output out")
    from rayprune.report.collect import collect

    folders = [as_path(path) for path in paths]
    collected = collect(folders)
    from rayprune.engine.storage.run_folder import write_whole
    from rayprune.report.page import render, write_pngs

    target = as_path(png or output or _common_folder(folders) / "report.html")
    if not png and target.is_dir():
        raise ConfigError(f"{target} is a folder: name a file, such as --output {target}/report.html")
    if not png and target.exists() and not target.is_file():  # the page would replace a device or a pipe
        raise ConfigError(f"{target} is not a regular file: name another with --output")
    try:
        if png:
            for file in write_pngs(collected, target):
                say(file)
            return
        page = render(collected)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, page)
    except OSError as error:
        cure = "name another place with --output or --png"
        raise ConfigError(f"{target} can't be written ({error.strerror}): {cure}") from None
    for note in (*collected.omissions, *collected.run_notes):
        warn(note)
    if collected.gallery_note:
        say(collected.gallery_note, "dim")
    say(f"report: {target}")


def _common_folder(folders: list[Path]) -> Path:
    if len(folders) == 1:
        return folders[0]
    first, *others = [folder.absolute() for folder in folders]
    for parent in (first, *first.parents):
        if all(other.is_relative_to(parent) for other in others) and (parent.is_absolute() or len(parent.parts) > 1):
            return parent
    raise ConfigError("the folders have none in common: name the page, --output FILE")


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--sort", metavar="SCORE", help="The column of scores.parquet to sort by. [default: the first]")
@click.option(
    "--top", default=20, show_default=True, type=click.IntRange(1, MAX_INT), metavar="N", help="How many samples."
)
@click.option("--ascending", is_flag=True, help="The lowest first.")
@debug_option
def show(run: str, sort: str | None, top: int, ascending: bool) -> None:
    """Print the settings of RUN, the folder of a run, its epochs, and its samples by score."""
    from rayprune.report.read import read_run
    from rayprune.report.tables import epochs_table, facts, samples_table

    record = read_run(as_path(run))
    tables = [epochs_table(record)]
    if record.scores is not None or sort is not None:
        tables.append(samples_table(record, sort, top, ascending))
    for name, value in facts(record):
        say(f"{name:<12} {value}")
    for note in record.notes:
        warn(note)
    for table in tables:
        say()
        say_table([table.head, *table.rows], table.words)
