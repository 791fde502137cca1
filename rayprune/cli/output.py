"""Standard output and error that cannot end a command, and text that cannot control the terminal."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
from typing import Any

from rich.console import Console

from rayprune.errors import one_line

# Control characters but tab and newline, halves of surrogate pairs (bytes of a name that are not UTF-8), and marks that
# change the direction of text.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return text with control characters escaped: names of files may hold commands to the terminal.

    >>> printable("a\x1b[31m/ü")
    'a\\x1b[31m/ü'
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class _SafeFile(io.FileIO):
    """A file descriptor that drops what it cannot write, and keeps the first error: no training may be lost by it."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]  # as FileIO itself
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return len(data)


_files: dict[str, _SafeFile] = {}


def guard_streams() -> None:
    """Make sys.stdout and sys.stderr unable to fail, and let each log record be one printable line."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _fill(number)
        stream = getattr(sys, name)
        if number == 0 or stream is not getattr(sys, f"__{name}__"):  # replaced by a test or another program
            continue
        _files[name] = _SafeFile(number, "w", closefd=False)
        options: dict[str, Any] = {"line_buffering": number == 2}
        if stream is not None:
            stream.flush()
            options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        # An encoding other than UTF-8 may lack characters.
        options |= {"encoding": getattr(stream, "encoding", "utf-8"), "errors": "backslashreplace"}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(_files[name]), **options))
    if not logging.getLogger().handlers:
        logging.lastResort = LogLines(logging.WARNING)


def _fill(number: int) -> None:
    """Open a standard stream that is closed: otherwise the next file would get its number, and all that is printed.

    It fails when it is used, as a closed one does.
    """
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)


def output_failure() -> OSError | None:
    """Flush standard output; return the error that has cut it short, or None."""
    sys.stdout.flush()
    return _files["stdout"].failure if "stdout" in _files else None


def is_closed_pipe(error: OSError) -> bool:
    """Return whether the reader of standard output has left, as `head` does."""
    return error.errno == errno.EPIPE


class LogLines(logging.Handler):
    """Print each record as one line on standard error; tracebacks only with --debug."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        try:
            lines = " ".join(record.getMessage().split())
            if record.exc_info and record.exc_info[1] is not None:
                debug = "--debug" in sys.argv
                lines += (
                    f"\n{logging.Formatter().formatException(record.exc_info)}"
                    if debug
                    else f" ({one_line(record.exc_info[1])})"
                )
            options: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
            Console(stderr=True, soft_wrap=True).print(printable(lines), **options)
        except Exception:
            self.handleError(record)
