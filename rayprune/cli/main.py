"""The command line: `rayprune COMMAND`, with a module for each command or two.

Exit codes: 0 success, 2 a mistake of the user (reported in one line), 130 Ctrl-C, 1 any other error; tracebacks only
with --debug. The first Ctrl-C saves a run, the second one ends the process at once.
Modules of commands import slow libraries (torch, Ray, pandas, matplotlib) inside functions.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click
import psutil

from rayprune import __version__
from rayprune.cli.audit import audit
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
from rayprune.errors import TrainingPaused, one_line

# click 8.2 and newer raises this for `rayprune` without arguments; its message is the help.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())
_INTERRUPTED = 130  # exit code of a command that Ctrl-C has ended, as in shells
_CONTINUING = {"train", "score", "compare", "sweep", "audit"}


def main() -> None:
    """Run the command line and exit with its code."""
    # A user's `module:function` must be importable from the current folder, as with `python -m`.
    sys.path.insert(0, str(Path.cwd()))
    ctrl_c = _CtrlC()
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort as error:
        ctrl_c.leave(one_line(error) if error.args else _stopped())
    except TrainingPaused as error:  # by SIGTERM
        _fail(one_line(error), 1)
    except _NO_ARGUMENTS as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if ctrl_c.is_pressed:  # inside an import, for example, Ctrl-C can become any error
            ctrl_c.leave(_stopped())
        if isinstance(error, ValueError):
            _fail(one_line(error), 2)
        _fail(f"{one_line(error)} (--debug shows where)", 1)
    finally:
        ctrl_c.is_pressed = True  # Ctrl-C must not interrupt the shutdown of Ray, which would print tracebacks


class _CtrlC:
    """The handler of SIGINT: interrupts the command, and ends the process if it is pressed again."""

    def __init__(self) -> None:
        self.is_pressed = False
        self._children: list[psutil.Process] = []
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background commands ignore it
            signal.signal(signal.SIGINT, self)

    def __call__(self, *_: Any) -> None:
        if self.is_pressed:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
            self._end()
        self.is_pressed = True
        raise KeyboardInterrupt

    def leave(self, line: str) -> NoReturn:
        """Print the line on an interrupted command, shut Ray down, and exit."""
        self.is_pressed = True
        if errors.is_terminal:
            errors.print()  # the terminal has echoed ^C
        errors.print(line, highlight=False, markup=False)
        self._children = _children()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        self._end()  # Python would take seconds to tear torch down

    def _end(self) -> NoReturn:
        """End the process, and what is left of a local Ray: a worker that loses its raylet while it exits may hang."""
        for child in self._children or _children():
            with contextlib.suppress(psutil.Error):  # it has ended
                child.kill()
        os._exit(_INTERRUPTED)


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; click prints an empty line for a KeyboardInterrupt, but not for its own exception."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise click.exceptions.Abort(*interrupt.args) from interrupt


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rayprune")
@debug_option
def cli() -> None:
    """Train each epoch only on the samples worth training on."""


for command in (init, train, score, audit, select, evaluate, compare, sweep, report, show, methods, schema, doctor):
    cli.add_command(command)


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _stopped() -> str:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return "stopped: the same command continues" if command in _CONTINUING else "stopped"


def _fail(line: str, code: int) -> NoReturn:
    errors.print(f"error: {line}", highlight=False, markup=False)
    sys.exit(code)
