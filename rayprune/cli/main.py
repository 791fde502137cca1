"""The command line: rayprune train | sweep | compare | score | select | evaluate | report | show | methods | doctor.

Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else; tracebacks only with --debug.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rayprune import __version__
from rayprune.cli.compare import compare
from rayprune.cli.console import errors
from rayprune.cli.doctor import doctor
from rayprune.cli.evaluate import evaluate
from rayprune.cli.methods import methods
from rayprune.cli.report import report, show
from rayprune.cli.select import select
from rayprune.cli.sweep import sweep
from rayprune.cli.train import score, train

# What click from 8.2 on raises for `rayprune` alone: its message is the help.
_HELP = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main() -> None:
    """Run the command line and exit with its code."""
    # `module:function` of the user's own must be found where the command is given, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted; the same command goes on from the last checkpoint", 1)
    except click.ClickException as error:
        if isinstance(error, _HELP):
            error.show()
            sys.exit(error.exit_code)
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except ValueError as error:
        _or_raise(error, debug)
        _fail(_one_line(error), 2)
    except Exception as error:
        _or_raise(error, debug)
        _fail(f"{_one_line(error)} (--debug shows where)", 1)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rayprune")
@click.option("--debug", is_flag=True, help="Show tracebacks and Ray's own logs.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Train each epoch only on the samples worth training on."""
    context.obj = debug


for command in (train, score, select, evaluate, compare, sweep, report, show, methods, doctor):
    cli.add_command(command)


def _or_raise(error: Exception, debug: bool) -> None:
    if debug:
        raise error


def _fail(line: str, code: int) -> None:
    errors.print(f"error: {line}", highlight=False, markup=False)
    sys.exit(code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
