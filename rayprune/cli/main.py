"""The command line: `rayprune COMMAND`, with a module for each command or two.

Exit codes: 0 success, 2 a mistake of the user (reported in one line), 1 any other error; tracebacks only with --debug.
Modules of commands import slow libraries (torch, Ray, pandas, matplotlib) inside functions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

from rayprune import __version__
from rayprune.cli.compare import compare
from rayprune.cli.console import debug_option, errors
from rayprune.cli.doctor import doctor
from rayprune.cli.evaluate import evaluate
from rayprune.cli.init import init
from rayprune.cli.methods import methods
from rayprune.cli.report import report, show
from rayprune.cli.schema import schema
from rayprune.cli.select import select
from rayprune.cli.sweep import sweep
from rayprune.cli.train import score, train
from rayprune.errors import one_line

# click 8.2 and newer raises this for `rayprune` without arguments; its message is the help.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main() -> None:
    """Run the command line and exit with its code."""
    # A user's `module:function` must be importable from the current folder, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; run the same command again to resume from the last checkpoint", 1)
    except _NO_ARGUMENTS as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, ValueError):
            _fail(one_line(error), 2)
        _fail(f"{one_line(error)} (--debug shows where)", 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rayprune")
@debug_option
def cli() -> None:
    """Train each epoch only on the samples worth training on."""


for command in (init, train, score, select, evaluate, compare, sweep, report, show, methods, schema, doctor):
    cli.add_command(command)


def _fail(line: str, code: int) -> NoReturn:
    errors.print(f"error: {line}", highlight=False, markup=False)
    sys.exit(code)
