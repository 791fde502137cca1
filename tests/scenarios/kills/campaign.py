"""Draw a schedule of faults and carry it out: wait for the step, strike, see training continue, compare the end."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rayprune.engine.storage.run_folder import read_metrics

from .driver import BATCH_SIZE, Driver, running
from .faults import FAULTS, Fault, Missed
from .results import Outcome, Planned, differences
from .steps import Step, now
from .watched_model import PAUSE_S

_STALL_S = 150.0
_MAX_STARTS = 30
_POLL_S = 0.002
# Steps between two faults of one run: each should hit training, not the recovery from the fault before.
_MIN_DISTANCE = 4
_TRIES = 3  # a process may have ended just now, by the fault before


class Stalled(Exception):
    """Training did not continue."""


def interior(steps_per_epoch: Sequence[int]) -> list[tuple[int, int]]:
    """Return the positions well inside epochs: without the first and the last two steps of each."""
    return [(epoch, step) for epoch, steps in enumerate(steps_per_epoch) for step in range(1, steps - 2)]


def draw_faults(count: int, names: Sequence[str], rng: random.Random) -> list[Fault]:
    """Return `count` faults in random order, with an equal number of each kind."""
    faults = [FAULTS[names[index % len(names)]] for index in range(count)]
    rng.shuffle(faults)
    return faults


def draw_schedule(faults: Sequence[Fault], steps_per_epoch: Sequence[int], rng: random.Random) -> list[Planned]:
    """Place faults at random positions of one run, in the given order and some steps apart.

    Raises:
        ValueError: the run is too short for so many.
    """
    positions = interior(steps_per_epoch)
    starts = list(itertools.accumulate(steps_per_epoch, initial=0))
    for _ in range(10_000):
        chosen = sorted(rng.sample(positions, len(faults))) if len(faults) <= len(positions) else []
        steps = [starts[epoch] + step for epoch, step in chosen]
        if chosen and all(b - a >= _MIN_DISTANCE for a, b in itertools.pairwise(steps)):
            return [Planned(fault, position) for fault, position in zip(faults, chosen, strict=True)]
    raise ValueError(f"{len(faults)} faults do not fit into {len(steps_per_epoch)} epochs: take more epochs")


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a run: its faults, those that are left, the repeated steps, and the differences at the end."""

    outcomes: list[Outcome]
    left: list[Fault]
    num_repeated: int
    differences: list[str]


class Campaign:
    """Inject faults into one run.

    Args:
        driver: the run, not started.
        steps_per_epoch: of the reference run.
        rng: source of the random choices.
        on_outcome: called with each outcome once it is complete.
    """

    def __init__(
        self, driver: Driver, steps_per_epoch: Sequence[int], rng: random.Random, on_outcome: Callable[[Outcome], None]
    ) -> None:
        self._driver, self._rng, self._on_outcome = driver, rng, on_outcome
        self._interior = set(interior(steps_per_epoch))
        self._outcomes: list[Outcome] = []
        self._last_progress = now()

    def run(self, schedule: Sequence[Planned], reference: Path) -> RunOutcome:
        """Carry out the schedule and compare the finished run with the reference run."""
        left, tries = list(schedule), 0
        with running(self._driver):
            while left and self._wait(lambda: self._is_due(left[0])):
                if tries == 0:
                    self._complete_outcome()
                tries += 1
                if self._strike(left[0], is_last_try=tries == _TRIES):
                    left.pop(0)
                    tries = 0
            while self._wait(lambda: False):
                pass
            if tries == 0:
                self._complete_outcome()
        code = self._driver.exit_code()
        texts = differences(self._driver.folder, reference) if code == 0 else [f"the command ended with {code}"]
        for outcome in self._outcomes if texts else []:
            outcome.lost = outcome.lost or texts[0]
        return RunOutcome(self._outcomes, [planned.fault for planned in left], self._driver.log.num_repeated, texts)

    def _is_due(self, planned: Planned) -> bool:
        step = self._last_step()
        if step is None or now() - step.at >= PAUSE_S / 2:
            return False
        return step.position >= planned.position and step.position in self._interior

    def _strike(self, planned: Planned, is_last_try: bool) -> bool:
        """Inject a fault and wait until training continues; False if there was nothing to hit and tries are left."""
        before = self._last_step()
        assert before is not None
        outcome = Outcome(planned, start=now(), num_starts=self._driver.num_starts)
        time.sleep(self._rng.uniform(0, PAUSE_S))  # any moment of the step
        step = self._last_step()
        assert step is not None
        outcome.position = step.position
        try:
            outcome.hit = planned.fault.strike(self._driver, self._rng)
        except (Missed, psutil.NoSuchProcess) as error:
            if not is_last_try:
                return False
            outcome.lost = f"missed: {error}"
        self._driver.log.update()
        outcome.end = now()
        self._outcomes.append(outcome)
        restarts, known = planned.fault.restarts and not outcome.lost, len(self._driver.log.steps)

        def continued() -> bool:
            steps = self._driver.log.steps
            return len(steps) > known and (not restarts or steps[-1].pid != before.pid)

        self._wait(continued)
        return True

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Wait until `ready`; run the command again when it ended too early. False: the run is done or given up."""
        self._last_progress = now()
        while True:
            known = len(self._driver.log.steps)
            done = ready()
            if len(self._driver.log.update()) > known:
                self._last_progress = now()
            if done:
                return True
            code = self._driver.exit_code()
            if code == 0 or self._driver.num_starts >= _MAX_STARTS:
                return False
            if code is not None:
                self._restart("")
            elif now() - self._last_progress > _STALL_S:
                self._restart(f"no step for {_STALL_S:.0f} s")
            time.sleep(_POLL_S)

    def _restart(self, stall: str) -> None:
        self._last_progress = now()
        self._driver.kill()
        if self._outcomes:
            self._outcomes[-1].lost = self._outcomes[-1].lost or stall
        elif stall or self._driver.num_starts > 3:
            raise Stalled(f"the run does not start: {self._driver.last_output()}")
        self._driver.start()

    def _complete_outcome(self) -> None:
        """Complete and report the last outcome: the next fault is about to strike, or the run is over."""
        if self._outcomes:
            outcome = self._outcomes[-1]
            outcome.effect = self._driver.log.effect(outcome.start, outcome.end, now())
            outcome.num_commands = self._driver.num_starts - outcome.num_starts
            self._on_outcome(outcome)

    def _last_step(self) -> Step | None:
        steps = self._driver.log.update()
        return steps[-1] if steps else None


def run_reference(driver: Driver) -> None:
    """Run the command to its end without faults.

    Raises:
        Stalled: it failed.
    """
    with running(driver):
        end = now() + _STALL_S
        while driver.exit_code() is None and now() < end:
            time.sleep(0.1)
        if driver.exit_code() != 0:
            raise Stalled(f"the reference run failed: {driver.last_output()}")


def steps_per_epoch(run: Path) -> list[int]:
    """Return the steps of each epoch of a finished run of `configuration`."""
    return [-(-line["kept"] // BATCH_SIZE) for line in read_metrics(run)]
