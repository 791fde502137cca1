"""Where the commands print, and the option that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)


def debug_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --debug to a command."""
    return click.option("--debug", "debug_here", is_flag=True, help="Show tracebacks and Ray's own logs.")(command)
