"""Disturb every process of every command in every way, and print a table; exit with 1 if a result differs."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rayprune.paths import as_path
from tests.scenarios.kills.driver import running
from tests.support.object_store import BUCKET, object_store

from .cells import DISTURBANCES, HEAD, TWO_COMMANDS, Cell, Failed, finish, new_driver, run_cell
from .commands import COMMANDS, Command


def main() -> int:
    """Run the cells; return the exit code."""
    processes = sorted({name for command in COMMANDS.values() for name in command.processes})
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios.faults", description=__doc__)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--processes", nargs="+", choices=processes, default=processes)
    choices = [*DISTURBANCES, *TWO_COMMANDS]
    parser.add_argument("--disturbances", nargs="+", choices=choices, default=choices)
    parser.add_argument("--object-store", action="store_true", help="store on an S3 server that fails now and then")
    parser.add_argument("--out", type=Path, help="also write the table to this file, after each cell")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leave no process behind
    cells: list[Cell] = []
    failures: list[str] = []
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="rayprune-faults-"))
        storage = None
        if arguments.object_store:
            stack.enter_context(stack.enter_context(object_store()).failing(share=0.02, slow_s=0.01))
            storage = as_path(BUCKET)
        for name in arguments.commands:
            command = COMMANDS[name]
            reference = _reference(command, Path(temporary))
            for process, disturbance in _pairs(command, arguments.processes, arguments.disturbances):
                try:
                    cell = run_cell(command, process, disturbance, Path(temporary), reference, storage)
                except Failed as error:
                    failures.append(f"{name}, {process}, {disturbance}: {error}")
                    print(f"FAILED {failures[-1]}", flush=True)
                    continue
                finally:
                    for used in Path(temporary).glob(f"{name.replace(' ', '-')}-{process}-*"):
                        shutil.rmtree(used, ignore_errors=True)
                if cell is not None:
                    cells.append(cell)
                    print(cell.row, flush=True)
                    if arguments.out is not None:
                        arguments.out.write_text("\n".join([HEAD, *(each.row for each in cells)]) + "\n")
    different = sum(bool(cell.differences) for cell in cells)
    print(
        f"{len(cells)} cells in {time.monotonic() - start:.0f} s: {len(cells) - different} end with the undisturbed "
        f"result, {different} with another, {len(failures)} failed"
    )
    return int(bool(different or failures))


def _pairs(command: Command, processes: list[str], disturbances: list[str]) -> Iterator[tuple[str, str]]:
    for process in command.processes:
        for disturbance in disturbances:
            if process in processes and (process == "driver" or disturbance not in TWO_COMMANDS):
                yield process, disturbance


def _reference(command: Command, folder: Path) -> Path:
    driver = new_driver(command, folder, f"reference-{command.name}")
    with running(driver):
        if (code := finish(driver)) != 0:
            raise Failed(f"the undisturbed {command.name} ends with {code}: {driver.last_output()}")
    return driver.storage


if __name__ == "__main__":
    sys.exit(main())
