"""Shared by all commands: the console, arguments, the option --debug, and tables of text."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from rayprune.cli.output import printable
from rayprune.errors import ConfigError

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)
_DEBUG = "rayprune.debug"
_ALL_CODE = "all"


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --debug to a command, which reads it with `debug`."""

    def remember(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.meta[_DEBUG] = value or context.meta.get(_DEBUG, False)  # it may also precede the command

    text = "Show tracebacks and Ray's own logs."
    return click.option("--debug", is_flag=True, expose_value=False, callback=remember, help=text)(command)


def debug() -> bool:
    """Return whether the running command has the option --debug."""
    return bool(click.get_current_context().meta.get(_DEBUG))


class _Digest(click.ParamType):
    name = "digest"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool | str:
        if isinstance(value, bool) or value == _ALL_CODE:
            return bool(value)
        if not re.fullmatch(r"[0-9a-f]{32}", value):
            self.fail(
                f"{value!r} is not a digest of 32 hexadecimal digits: put --trust last, to trust the code as it is"
            )
        return str(value)


def trust_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --trust to a command that uses the config of a run folder; it passes `trust` as `read_trusted` takes it."""
    text = "Run the code that RUN's config names; with DIGEST, only code of this digest, as the message shows it."
    return click.option(
        "--trust", is_flag=False, flag_value=_ALL_CODE, default=False, type=_Digest(), metavar="[DIGEST]", help=text
    )(command)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command's arguments into configs and folders, which may have = in their paths, and the overrides."""
    configs = [word for word in arguments if _is_config(word)]
    return configs, [word for word in arguments if word not in configs]


def _is_config(word: str) -> bool:
    """Return whether an argument is a config or a folder, whether it exists or not, and no override."""
    key, equals, _ = word.partition("=")
    if not equals or "/" in key or Path(word).is_dir():
        return True
    if not word.endswith((".yaml", ".yml")):
        return False
    from rayprune.config import Config

    return Path(word).is_file() or key.partition(".")[0] not in Config.model_fields


def single_config(arguments: Sequence[str], example: str, noun: str = "config") -> tuple[str, list[str]]:
    """Return the one config file, or run folder, among a command's arguments, and the overrides.

    Raises:
        ConfigError: there is none, or more than one.
    """
    paths, overrides = split_arguments(arguments)
    if len(paths) != 1:
        raise ConfigError(f"name one {noun}: {example}")
    return paths[0], overrides


def say(line: object = "", style: str | None = None) -> None:
    """Print a line without markup and colors for numbers; control characters, as in a file's name, are escaped."""
    console.print(printable(str(line)), style=style, highlight=False, markup=False, emoji=False)


def plain_text(text: str) -> Text:
    """Return a cell of a table without markup; control characters are escaped."""
    return Text(printable(text))


def warn(line: str) -> None:
    """Print a line in yellow."""
    say(line, "yellow")


def say_table(rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> None:
    """Print rows of cells as a table; the first row is the head."""
    cells = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    for number, line in enumerate(aligned(cells, words)):
        say(line, None if number else "bold")


def aligned(rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> list[str]:
    """Return rows of cells as lines; columns are as wide as their content, so that no number is cut.

    Args:
        rows: of equal length.
        words: indices of the columns that are aligned to the left.

    >>> aligned([("run", "seconds"), ("full", "10.5")])
    ['run   seconds', 'full     10.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def elapsed(start: float) -> str:
    """Return the time since a value of time.perf_counter() as text."""
    return f"{time.perf_counter() - start:.1f} s"
