"""The command line: `rayprune COMMAND`, with a module for each command or two.

Exit codes: 0 success, 2 what a person can mend (settings, data, arguments, the machine's limits), 130 Ctrl-C, 141 the
reader of the output has left, 1 any other error. Errors are one line (`rayprune.cli.errors`); tracebacks only with
--debug. The first Ctrl-C saves a run, the second one ends the process at once.
Modules of commands import slow libraries (torch, Ray, pandas, matplotlib) inside functions.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click
import psutil

from rayprune import __version__
from rayprune.cli.audit import audit
from rayprune.cli.compare import compare
from rayprune.cli.console import debug_option, errors
from rayprune.cli.doctor import doctor
from rayprune.cli.errors import explain
from rayprune.cli.evaluate import evaluate
from rayprune.cli.init import init
from rayprune.cli.methods import methods
from rayprune.cli.output import guard_streams, is_closed_pipe, output_failure, printable
from rayprune.cli.report import report, show
from rayprune.cli.schema import schema
from rayprune.cli.select import select
from rayprune.cli.sweep import sweep
from rayprune.cli.train import score, train
from rayprune.errors import one_line

# click 8.2 and newer raises this for `rayprune` without arguments; its message is the help.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())
_INTERRUPTED, _PIPE_CLOSED = 130, 141  # exit codes of commands that SIGINT and SIGPIPE have ended, as in shells
# Paragraphs that Ray prints when one of its processes has died; the run continues, or ends with a line of its own.
_RAY_NOTICES = "A worker died or was killed while executing a task|Termination is unexpected"
_CONTINUING = {"train", "score", "compare", "sweep", "audit"}


def main() -> None:
    """Run the command line and exit with its code."""
    # Processes that this one starts (Ray's, multiprocessing's) must not put the current folder on their path either.
    os.environ["PYTHONSAFEPATH"] = "1"
    guard_streams()
    if "--debug" not in sys.argv:
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", _RAY_NOTICES)
    ctrl_c = _CtrlC()
    try:
        code = cli.main(standalone_mode=False)  # of click's own options, such as --help
    except click.exceptions.Abort as error:
        ctrl_c.leave(one_line(error) if error.args else _stopped())
    except _NO_ARGUMENTS as error:
        error.show()
        code = error.exit_code
    except _Terminated:
        _say_error(_stopped())
        code = 1
    except BaseException as error:
        if "--debug" in sys.argv and not isinstance(error, click.ClickException):
            if not isinstance(error, SystemExit):  # it would be obeyed
                raise
            traceback.print_exception(error)
        if ctrl_c.is_pressed:  # inside an import, for example, Ctrl-C can become any error
            ctrl_c.leave(_stopped())
        line, code = explain(error)
        _say_error(line)
    finally:
        ctrl_c.is_pressed = True  # Ctrl-C must not interrupt the shutdown of Ray, which would print tracebacks
    sys.exit(_with_output(code or 0))


class _Terminated(BaseException):
    """SIGTERM has come outside of training; no SystemExit, which a user's code may raise."""


class _CtrlC:
    """The handlers of SIGINT, which interrupts the command and ends the process if it comes again, and of SIGTERM."""

    def __init__(self) -> None:
        self.is_pressed = False
        self._children: list[psutil.Process] = []
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background commands ignore it
            signal.signal(signal.SIGINT, self)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)

    def __call__(self, *_: Any) -> None:
        if self.is_pressed:
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
            self._end()
        self.is_pressed = True
        raise KeyboardInterrupt

    def _terminate(self, *_: Any) -> None:
        """The handler of SIGTERM, but for training, sweeps and comparisons, which save first."""
        if not self.is_pressed:
            self.is_pressed = True
            raise _Terminated

    def leave(self, line: str) -> NoReturn:
        """Print the line on an interrupted command, shut Ray down, and exit."""
        self.is_pressed = True
        if errors.is_terminal:
            errors.print()  # the terminal has echoed ^C
        errors.print(printable(line), highlight=False, markup=False, emoji=False)
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


def _say_error(line: str) -> None:
    errors.print(f"error: {printable(line)}", highlight=False, markup=False, emoji=False)


def _with_output(code: int) -> int:
    """Return the exit code of a command, which may have lost its output."""
    failure = output_failure()
    if failure is None or code:
        return code
    if is_closed_pipe(failure):
        return _PIPE_CLOSED
    _say_error(
        f"standard output can't be written ({failure.strerror}): send it to a file on a disk with free space; what "
        "the command writes elsewhere is complete"
    )
    return 1
