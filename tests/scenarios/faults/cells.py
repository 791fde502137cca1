"""One cell of the matrix: disturb one process of a command once, let the command end, and look at the result."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.scenarios.kills.driver import Driver, running, title
from tests.scenarios.kills.results import differences

from .commands import Command

_STOPPED_S, _SECOND_PRESS_S = 40.0, 1.0
_LIMIT_S, _POLL_S = 300.0, 0.05


class Failed(Exception):
    """The command does not get to the point, or does not end."""


def _send(number: signal.Signals) -> Callable[[psutil.Process], None]:
    return lambda process: process.send_signal(number)


def _send_to_group(number: signal.Signals, times: int = 1) -> Callable[[psutil.Process], None]:
    def strike(process: psutil.Process) -> None:
        group = os.getpgid(process.pid)
        for press in range(times):
            time.sleep(_SECOND_PRESS_S if press else 0.0)
            with suppress(ProcessLookupError):  # the first one has ended it
                os.killpg(group, number)

    return strike


def _stop(process: psutil.Process) -> None:
    process.suspend()
    time.sleep(_STOPPED_S)
    with suppress(psutil.NoSuchProcess):
        process.resume()


DISTURBANCES: dict[str, Callable[[psutil.Process], None]] = {
    "SIGKILL": _send(signal.SIGKILL),
    "SIGSTOP 40 s": _stop,
    "SIGTERM": _send(signal.SIGTERM),
    "SIGTERM to its group": _send_to_group(signal.SIGTERM),
    "SIGINT twice to its group": _send_to_group(signal.SIGINT, 2),
}
SECOND_COMMAND, BOTH_AT_ONCE = "the same command again", "the same command twice at once"
TWO_COMMANDS = (SECOND_COMMAND, BOTH_AT_ONCE)


@dataclass(frozen=True)
class Cell:
    """What was disturbed, and what came of it.

    Attributes:
        command, process, disturbance: their names.
        outcome: "continues", or the exit code and the line on stderr.
        seconds: from the disturbance to the end of the process, or of the whole command if it continues.
        lines: on stderr after the disturbance.
        differences: between the finished command and an undisturbed one.
    """

    command: str
    process: str
    disturbance: str
    outcome: str
    seconds: float
    lines: int
    differences: tuple[str, ...]

    @property
    def row(self) -> str:
        """The cell as a line of the Markdown table."""
        result = "equal" if not self.differences else f"DIFFERS: {self.differences[0]}"
        cells = (self.command, self.process, self.disturbance, self.outcome, f"{self.seconds:.0f}", result)
        return "| " + " | ".join(cells) + " |"


HEAD = "| command | process | disturbance | outcome | seconds | result |\n|---|---|---|---|---:|---|"


def new_driver(command: Command, folder: Path, name: str, storage: Path | None = None) -> Driver:
    """Return a driver of the command, not started, in a folder of its own; its runs are there, or below `storage`."""
    home = folder / name.replace(" ", "-")
    config = command.config(folder)
    if "path" in config["data"]:
        config["data"]["cache_dir"] = str(home / "cache")
    return Driver(home, config, None if storage is None else storage / home.name, command=command.word)


def finish(driver: Driver) -> int:
    """Wait until the command ends; return its exit code.

    Raises:
        Failed: it hangs.
    """
    end = time.monotonic() + _LIMIT_S
    while (code := driver.exit_code()) is None:
        if time.monotonic() > end:
            raise Failed(f"no end after {_LIMIT_S:.0f} s")
        time.sleep(_POLL_S)
    return code


def run_cell(
    command: Command, process: str, disturbance: str, folder: Path, reference: Path, storage: Path | None = None
) -> Cell | None:
    """Disturb a new run of the command; None if the signal goes to the group of the driver, which is its own cell.

    Args:
        command: the command.
        process, disturbance: a key of its processes, and of DISTURBANCES or one of TWO_COMMANDS.
        folder: of the campaign.
        reference: the storage path of an undisturbed run.
        storage: where the runs are stored; None for a local folder.
    """
    driver = new_driver(command, folder, f"{command.name}-{process}-{disturbance}", storage)
    with running(driver):
        if disturbance != BOTH_AT_ONCE:
            _wait_until_due(command, driver)
        if disturbance in TWO_COMMANDS:
            outcome, seconds, lines = _second_command(driver)
        else:
            target = _target(command.processes[process], driver)
            if process != "driver" and "group" in disturbance and os.getpgid(target.pid) == driver.processes()[0].pid:
                return None
            outcome, seconds, lines = _disturb(driver, target, disturbance)
        found = _differences(driver.storage, reference)
    return Cell(command.name, process, disturbance, outcome, seconds, lines, tuple(found))


def _wait_until_due(command: Command, driver: Driver) -> None:
    end = time.monotonic() + _LIMIT_S
    while not command.is_due(driver):
        if driver.exit_code() is not None or time.monotonic() > end:
            raise Failed(f"it cannot be disturbed: {driver.last_output()[-500:]}")
        time.sleep(_POLL_S)


def _target(beginning: str, driver: Driver) -> psutil.Process:
    processes = driver.processes()
    for process in processes if beginning else processes[:1]:
        text = title(process)
        if text.startswith(beginning) or text.split(" ")[0].endswith(beginning):
            return process
    raise Failed(f"no process {beginning} in {[title(process)[:40] for process in processes]}")


def _disturb(driver: Driver, target: psutil.Process, disturbance: str) -> tuple[str, float, int]:
    known, start = len(driver.errors()), time.monotonic()
    DISTURBANCES[disturbance](target)
    code = finish(driver)
    seconds, lines = time.monotonic() - start, driver.errors()[known:]
    if code == 0:
        return "continues", seconds, len(lines)
    if code > 0:
        outcome = f"exit {code}: `{lines[-1] if lines else 'no line'}`"
    else:
        outcome = f"ended by {signal.Signals(-code).name}"
    if len(lines) > 1:
        outcome += f" and {len(lines) - 1} other lines"
    driver.start()
    if (code := finish(driver)) != 0:
        outcome += f"; the same command then ends with {code}: {driver.errors()[-1:]}"
    return outcome, seconds, len(lines)


def _second_command(driver: Driver) -> tuple[str, float, int]:
    """Run the command again beside the first; both use the same folders."""
    start = time.monotonic()
    other = driver.beside()
    code, lines = finish(other), other.errors()
    seconds = time.monotonic() - start
    outcome = f"the second: exit {code}" + (f": `{lines[-1]}`" if code and lines else "")
    if (code := finish(driver)) != 0:
        outcome += f"; the first: exit {code}: {driver.errors()[-1:]}"
    return outcome, seconds, len(lines)


def _differences(storage: Path, reference: Path) -> Iterator[str]:
    """Yield the differences between the runs of two storage paths."""
    runs, expected = (sorted(str(run.relative_to(path)) for run in _runs(path)) for path in (storage, reference))
    if runs != expected:
        yield f"runs {runs} instead of {expected}"
        return
    for run in runs:
        yield from differences(storage / run, reference / run)


def _runs(path: Path) -> Iterator[Path]:
    """Yield the run folders in and below a folder, on any storage."""
    for entry in path.iterdir():
        if entry.is_dir():
            yield from _runs(entry)
        elif entry.name == "metrics.jsonl":
            yield path
