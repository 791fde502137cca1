"""The log of training steps that the watched model writes, and what a disturbance did to it."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One training step: where it is, when it began, in which process of rank 0."""

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
    """What followed a disturbance: the steps done again, and the seconds until training went on (None: never)."""

    redone: int
    back_s: float | None


class StepLog:
    """Follow `<folder>/steps`."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "steps"
        self._read = 0
        self.steps: list[Step] = []

    def update(self) -> list[Step]:
        """Read what is new; return all steps."""
        if self._file.exists():
            with self._file.open("rb") as stream:
                stream.seek(self._read)
                new = stream.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            self.steps += [_parse(line) for line in whole.splitlines()]
        return self.steps

    @property
    def num_redone(self) -> int:
        """How many steps were done again."""
        return len(self.steps) - len({step.position for step in self.steps})

    def effect(self, began: float, ended: float, until: float) -> Effect:
        """Return what a disturbance did.

        Args:
            began: when it began.
            ended: when it was over (a kill: at once).
            until: when the next one began.
        """
        before = [step for step in self.steps if step.at <= began]
        after = [step for step in self.steps if began < step.at <= until]
        redone, restarted = 0, []
        for last, step in itertools.pairwise([*before[-1:], *after]):
            if step.pid != last.pid:  # a new attempt: whatever lies at or past its first step is done again
                redone += len(
                    {one.position for one in self.steps if one.at < step.at and one.position >= step.position}
                )
                restarted.append(step.at)
        # Dying workers may still take a step or two; a restart while the storage was away is back at its return.
        resumed = restarted or [step.at for step in after if step.at > ended]
        return Effect(redone, max(0.0, resumed[0] - ended) if resumed else None)


def now() -> float:
    """Return seconds on the clock of the log, which all processes of a machine share."""
    return time.monotonic()


def _parse(line: bytes) -> Step:
    epoch, step, nanoseconds, pid = line.split()
    return Step(int(epoch), int(step), int(nanoseconds) / 1e9, int(pid))
