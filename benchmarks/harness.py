"""Time something n times and say what was seen: median, spread, the wished-for figure, and whether it holds.

Machines drift, so what is compared is compared inside one run, in turns.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

NAME_WIDTH = 86


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    Attributes:
        name: what was measured, with its unit.
        values: one a repetition.
        goal: such as "≤ 0.3" or "≥ 30"; empty where there is none.
    """

    name: str
    values: list[float]
    goal: str = ""

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def holds(self) -> str:
        """ "yes", "NO", or "" without a goal."""
        if not self.goal:
            return ""
        sign, bound = self.goal.split()
        return "yes" if (self.median <= float(bound) if sign == "≤" else self.median >= float(bound)) else "NO"

    def row(self) -> str:
        """Return the figure as a line of the table."""
        low, high = min(self.values), max(self.values)
        spread = f"{low:.4g} … {high:.4g}"
        named = f"{self.name:<{NAME_WIDTH}} {len(self.values):>3}"
        return f"{named} {self.median:>10.4g}   {spread:<22} {self.goal:<8} {self.holds}"


HEADER = f"{'figure':<{NAME_WIDTH}} {'n':>3} {'median':>10}   {'spread':<22} {'goal':<8} holds"


def seconds(action: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def repeat(action: Callable[[], object], count: int, warm_up: int = 1) -> list[float]:
    """Return the seconds of `count` calls after `warm_up` uncounted ones."""
    for _ in range(warm_up):
        action()
    return [seconds(action) for _ in range(count)]


def peak_bytes() -> int:
    """Return the most memory that this process has held; a child's ru_maxrss begins with its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def machine() -> str:
    """Return a line on hardware and versions."""
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
