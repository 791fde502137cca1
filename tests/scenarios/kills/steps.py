"""The log of training steps that the watched model writes, and the effect of a fault on it."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        epoch, step: its position.
        at: when it started, on the clock of `now`.
        pid: the process of rank 0.
    """

    epoch: int
    step: int
    at: float
    pid: int

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, step)."""
        return self.epoch, self.step


@dataclass(frozen=True)
class Effect:
    """The effect of a fault: the number of repeated steps, and the seconds until training continued (None: never)."""

    num_repeated: int
    recovery_s: float | None


class StepLog:
    """Follow `<folder>/steps`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "steps"
        self._offset = 0
        self.steps: list[Step] = []

    def update(self) -> list[Step]:
        """Read the new lines; return all steps."""
        if self._file.exists():
            with self._file.open("rb") as stream:
                stream.seek(self._offset)
                new = stream.read()
            complete = new[: new.rfind(b"\n") + 1]
            self._offset += len(complete)
            self.steps += [_parse(line) for line in complete.splitlines()]
        return self.steps

    @property
    def num_repeated(self) -> int:
        """The number of steps that were repeated."""
        return len(self.steps) - len({step.position for step in self.steps})

    def effect(self, start: float, end: float, until: float) -> Effect:
        """Return the effect of a fault.

        Args:
            start: when the fault started.
            end: when it was over; a kill is over at once.
            until: when the next fault started.
        """
        before = [step for step in self.steps if step.at <= start]
        after = [step for step in self.steps if start < step.at <= until]
        num_repeated, restarts = 0, []
        for last, step in itertools.pairwise([*before[-1:], *after]):
            if step.pid != last.pid:  # a new attempt repeats all positions from its first step on
                repeated = {one.position for one in self.steps if one.at < step.at and one.position >= step.position}
                num_repeated += len(repeated)
                restarts.append(step.at)
        # Dying workers may still take a step or two; a restart while the storage was away counts from its return.
        continued = restarts or [step.at for step in after if step.at > end]
        return Effect(num_repeated, max(0.0, continued[0] - end) if continued else None)


def now() -> float:
    """Return seconds on the clock of the log, which all processes of a machine share."""
    return time.monotonic()


def _parse(line: bytes) -> Step:
    epoch, step, nanoseconds, pid = line.split()
    return Step(int(epoch), int(step), int(nanoseconds) / 1e9, int(pid))
