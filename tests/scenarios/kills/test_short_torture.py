"""The short form of the torture: one run, each process of it killed once inside an epoch, and it ends the same."""

from __future__ import annotations

import random
from pathlib import Path

from .campaign import Campaign, Outcome, undisturbed_run
from .driver import Driver, configuration
from .kinds import KINDS
from .report import line, table
from .schedule import draw_run

EPOCHS, SEED = 3, 5
SHORT = ("score_actor", "worker", "driver")


def test_killed_worker_score_actor_and_driver_change_nothing(tmp_path: Path) -> None:
    whole = Driver(tmp_path / "undisturbed", configuration(EPOCHS, "local"))
    driver = Driver(tmp_path / "disturbed", configuration(EPOCHS))
    steps = undisturbed_run(whole)
    rng = random.Random(SEED)
    outcomes: list[Outcome] = []
    schedule = draw_run([KINDS[name] for name in SHORT], steps, rng)
    ended = Campaign(driver, steps, rng, outcomes.append).run(schedule, whole.folder)
    told = "\n".join(map(line, outcomes))
    assert ended.different == [], told
    assert [outcome.planned.kind.name for outcome in outcomes] == list(SHORT)
    assert not any(outcome.lost for outcome in outcomes), told
    assert driver.starts == 2, "the driver was killed once and given the same command once"
    # A kill costs the steps since the last checkpoint, and one more interval where that one was under way.
    assert ended.redone < 6 * len(SHORT), told
    assert f"| all | {len(SHORT)} | {len(SHORT)} | 0 |" in table(outcomes)
