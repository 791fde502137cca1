"""The command `rayprune report`: runs, sweeps and comparisons as one page, or their plots alone."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console

console = Console(soft_wrap=True)


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
        raise ValueError("--png writes plots and no page: leave --output out")
    from rayprune.report.collecting import collect

    folders = [Path(path).expanduser() for path in paths]
    found = collect(folders)
    from rayprune.engine.run_folder import write_whole
    from rayprune.report.page import render, write_pngs

    target = Path(png or output or _common(folders) / "report.html").expanduser()
    if not png and target.is_dir():
        raise ValueError(f"{target} is a folder: name a file, such as --output {target}/report.html")
    if not png and target.exists() and not target.is_file():  # a device or a pipe, which the page would replace
        raise ValueError(f"{target} is no regular file: name another by --output")
    try:
        if png:
            for file in write_pngs(found, target):
                console.print(str(file), highlight=False, markup=False)
            return
        text = render(found)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
    except OSError as error:
        raise ValueError(
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
