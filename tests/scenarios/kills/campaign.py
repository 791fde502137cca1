"""Carry a schedule out: wait for the step, disturb, see training go on, compare the end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .driver import Driver, running
from .kinds import Missed
from .oracle import differences
from .schedule import Planned, interior
from .steps import Effect, Step, now
from .watched_model import PAUSE_S

_STALL_S = 150.0
_STARTS = 30
_POLL_S = 0.002


class Stalled(Exception):
    """Training did not go on."""


@dataclass
class Outcome:
    """What became of one disturbance.

    Attributes:
        at: the step that was under way.
        hit: what was hit.
        effect: steps done again and seconds.
        commands: how often the command was given again, because the driver was killed or ended.
        lost: why it counts as lost; empty when it was survived.
        began, ended: when, on the clock of the step log.
        starts: how often the command had been given before.
    """

    planned: Planned
    at: tuple[int, int] = (-1, -1)
    hit: str = ""
    effect: Effect = field(default_factory=lambda: Effect(0, None))
    commands: int = 0
    lost: str = ""
    began: float = 0.0
    ended: float = 0.0
    starts: int = 0


@dataclass(frozen=True)
class RunOutcome:
    """What became of a run: its disturbances, the steps done again in all, what differs at the end."""

    outcomes: list[Outcome]
    redone: int
    different: list[str]


class Campaign:
    """Disturb one run.

    Args:
        driver: the run, not started.
        steps_per_epoch: of the undisturbed run.
        tell: called with each disturbance when all about it is known.
    """

    def __init__(
        self, driver: Driver, steps_per_epoch: Sequence[int], rng: random.Random, tell: Callable[[Outcome], None]
    ) -> None:
        self._driver, self._rng, self._tell = driver, rng, tell
        self._inside = set(interior(steps_per_epoch))
        self._outcomes: list[Outcome] = []
        self._seen = now()

    def run(self, schedule: Sequence[Planned], undisturbed: Path) -> RunOutcome:
        """Carry the schedule out and compare the end."""
        with running(self._driver):
            for planned in schedule:
                if not self._wait(lambda planned=planned: self._is_due(planned)):  # type: ignore[misc]
                    break
                self._disturb(planned)
            while self._wait(lambda: False):
                pass
            self._settle()
        code = self._driver.ended()
        different = differences(self._driver.folder, undisturbed) if code == 0 else [f"the command ended with {code}"]
        for outcome in self._outcomes if different else []:
            outcome.lost = outcome.lost or different[0]
        return RunOutcome(self._outcomes, self._driver.log.num_redone, different)

    def _is_due(self, planned: Planned) -> bool:
        step = self._last()
        fresh = step is not None and now() - step.at < PAUSE_S / 2
        return fresh and step.position >= (planned.epoch, planned.step) and step.position in self._inside

    def _disturb(self, planned: Planned) -> None:
        self._settle()
        outcome, before = Outcome(planned, began=now(), starts=self._driver.starts), self._last()
        assert before is not None
        time.sleep(self._rng.uniform(0, PAUSE_S))  # any moment of the step
        under_way = self._last()
        assert under_way is not None
        outcome.at = under_way.position
        try:
            outcome.hit = planned.kind.act(self._driver, self._rng)
        except Missed as error:
            outcome.lost = f"not done: {error}"
        self._last()
        outcome.ended = now()
        self._outcomes.append(outcome)
        restarts, steps = planned.kind.restarts and not outcome.lost, len(self._driver.log.steps)
        self._wait(lambda: len(self._driver.log.steps) > steps and (not restarts or self._pid() != before.pid))

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Wait; give the command again where it ended before the run did. False: the run is done, or given up."""
        self._seen = now()
        while True:
            known = len(self._driver.log.steps)
            done = ready()
            if len(self._driver.log.update()) > known:
                self._seen = now()
            if done:
                return True
            code = self._driver.ended()
            if code == 0 or self._driver.starts >= _STARTS:
                return False
            if code is not None:
                self._again(None)
            elif now() - self._seen > _STALL_S:
                self._again(f"no step for {_STALL_S:.0f} s")
            time.sleep(_POLL_S)

    def _again(self, stalled: str | None) -> None:
        self._seen = now()
        self._driver.kill()
        if self._outcomes:
            self._outcomes[-1].lost = self._outcomes[-1].lost or stalled or ""
        elif stalled or self._driver.starts > 3:
            raise Stalled(f"the run does not start: {self._driver.last_words()}")
        self._driver.start()

    def _settle(self) -> None:
        """Tell what became of the last disturbance: the next one begins, or the run is over."""
        if self._outcomes:
            outcome = self._outcomes[-1]
            outcome.effect = self._driver.log.effect(outcome.began, outcome.ended, now())
            outcome.commands = self._driver.starts - outcome.starts
            self._tell(outcome)

    def _last(self) -> Step | None:
        steps = self._driver.log.update()
        return steps[-1] if steps else None

    def _pid(self) -> int:
        return self._driver.log.steps[-1].pid


def undisturbed_run(driver: Driver) -> list[int]:
    """Train to the end; return the steps of each epoch.

    Raises:
        Stalled: it failed.
    """
    with running(driver):
        end = now() + _STALL_S
        while driver.ended() is None and now() < end:
            time.sleep(0.1)
        if driver.ended() != 0:
            raise Stalled(f"the undisturbed run failed: {driver.last_words()}")
    positions = {step.position for step in driver.log.update()}
    epochs = [epoch for epoch, _ in positions]
    return [epochs.count(epoch) for epoch in sorted(set(epochs))]
