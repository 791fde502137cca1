"""Repeat a measurement and report its median, its spread, and whether the goal holds.

Machines drift, so alternatives are measured in alternation within one process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

NAME_WIDTH = 86
# The fields of a checkpoint's position.json that a benchmark of checkpoints does not measure.
POSITION = {
    "digest": "",
    "fingerprint": "",
    "shuffle": "",
    "wall_time": 0.0,
    "counts": {},
    "metrics": None,
    "sums": [],
}


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        name: the quantity and its unit.
        values: one per repetition.
        goal: a bound on the median, such as "≤ 0.3" or "≥ 30"; empty for none.
    """

    name: str
    values: list[float]
    goal: str = ""

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def holds(self) -> str:
        """ "yes", "NO", or "" without a goal."""
        if not self.goal:
            return ""
        sign, bound = self.goal.split()
        return "yes" if (self.median <= float(bound) if sign == "≤" else self.median >= float(bound)) else "NO"

    def row(self) -> str:
        """Return the figure as a row of the table."""
        spread = f"{min(self.values):.4g} … {max(self.values):.4g}"
        name = f"{self.name:<{NAME_WIDTH}} {len(self.values):>3}"
        return f"{name} {self.median:>10.4g}   {spread:<22} {self.goal:<8} {self.holds}"

    def cell(self) -> str:
        """Return the median, with the spread in parentheses unless all values are equal; NO marks a missed goal."""
        low, high = min(self.values), max(self.values)
        spread = f" ({_short(low)} … {_short(high)})" if low < high else ""
        return f"{_short(self.median)}{spread}" + (f" NO: {self.goal}" if self.holds == "NO" else "")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


@dataclass(frozen=True)
class Head:
    """The head of a Markdown table.

    Attributes:
        columns: of the rows that follow.
        holds: "", as a head has no goal.
    """

    columns: Sequence[str]
    holds: str = ""

    def row(self) -> str:
        """Return the head's two lines."""
        return f"\n| {' | '.join(self.columns)} |\n|{'---|' * len(self.columns)}"


@dataclass(frozen=True)
class Row:
    """Several measured quantities of one subject, as a row of a Markdown table.

    Attributes:
        name: the subject.
        figures: one per column; None leaves the cell empty.
    """

    name: str
    figures: Sequence[Figure | None]

    @property
    def holds(self) -> str:
        """ "NO" if one of the figures misses its goal, "yes" if all hold, or "" without a goal."""
        verdicts = {figure.holds for figure in self.figures if figure is not None}
        return next((verdict for verdict in ("NO", "yes") if verdict in verdicts), "")

    def row(self) -> str:
        """Return the figures' cells after the name."""
        cells = [self.name, *("" if figure is None else figure.cell() for figure in self.figures)]
        return f"| {' | '.join(cells)} |"


HEADER = f"{'figure':<{NAME_WIDTH}} {'n':>3} {'median':>10}   {'spread':<22} {'goal':<8} holds"


def seconds(action: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds(action: Callable[[], object]) -> float:
    """Return the CPU seconds of this process, all threads together, that one call takes."""
    start = time.process_time()
    action()
    return time.process_time() - start


def one_thread(module: str, *arguments: str) -> Iterator[str]:
    """Yield the lines that a module prints in a process of its own, which multiplies matrices in one thread.

    Its CPU seconds are thus those of one core that has nothing else to do, whatever else the machine does.
    """
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def repeat(action: Callable[[], object], count: int, warm_up: int = 1) -> list[float]:
    """Return the seconds of `count` calls after `warm_up` uncounted ones."""
    return alternate({"": lambda: seconds(action)}, count, warm_up)[""]


def alternate(measures: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Take all measurements in each round; return the values by name, without those of the warm-up rounds."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(warm_up + rounds):
        for name, measure in measures.items():
            value = measure()
            if number >= warm_up:
                values[name].append(value)
    return values


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratios of values that were measured side by side."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def peak_bytes(*, reset: bool = False) -> int:
    """Return the peak memory of this process; `reset` sets it to the present memory first, where Linux permits."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # memory that is free but not yet returned would hide what comes next
            Path("/proc/self/clear_refs").write_text("5")
    # Not ru_maxrss: in a child process it starts at the parent's peak.
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def machine() -> str:
    """Return one line that names hardware and versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("ray", "torch", "numpy"))
    cores = len(os.sched_getaffinity(0))
    date = time.strftime("%Y-%m-%d")
    return f"{date}, {_processor()}, {cores} cores, Python {sys.version.split()[0]}, {versions}"


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
