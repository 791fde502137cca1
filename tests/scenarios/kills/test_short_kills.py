"""The short form: one run whose worker, ScoreActor and command are each killed once inside an epoch."""

from __future__ import annotations

import random
from pathlib import Path

from rayprune.config import make_config
from rayprune.engine.train.driver import train

from .campaign import Campaign, draw_schedule, steps_per_epoch
from .driver import Driver, configuration
from .faults import FAULTS
from .results import Outcome, line, table

EPOCHS, SEED = 3, 5
NAMES = ("score_actor", "worker", "driver")


def test_a_killed_worker_score_actor_and_command_change_nothing(tmp_path: Path) -> None:
    """The reference run needs no Ray: one worker gives the same bits as none (tests/integration/test_workers.py)."""
    config = configuration(EPOCHS, num_workers=1, stream="local")
    scaling = {"num_workers": 0, "threads": 1, "use_gpu": False}
    run = {"storage_path": str(tmp_path), "name": "reference"}
    reference = train(make_config({**config, "scaling": scaling, "run": run})).folder
    assert_kills_change_nothing(Driver(tmp_path / "killed", config), reference)


def assert_kills_change_nothing(driver: Driver, reference: Path) -> None:
    """Run with one kill of each process and compare with the finished reference run."""
    steps, rng, outcomes = steps_per_epoch(reference), random.Random(SEED), list[Outcome]()
    schedule = draw_schedule([FAULTS[name] for name in NAMES], steps, rng)
    result = Campaign(driver, steps, rng, outcomes.append).run(schedule, reference)
    lines = "\n".join(map(line, outcomes))
    assert result.differences == [], lines
    assert [outcome.planned.fault.name for outcome in outcomes] == list(NAMES)
    assert not any(outcome.lost for outcome in outcomes), lines
    assert driver.num_starts == 2, "the command was killed once and run again once"
    # A kill costs the steps since the last checkpoint, plus one interval when that checkpoint was being written.
    assert result.num_repeated < 6 * len(NAMES), lines
    assert f"| all | {len(NAMES)} | {len(NAMES)} | 0 |" in table(outcomes)
