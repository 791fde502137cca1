"""Two workers that read through Ray Data; `python -m tests.scenarios.kills` is the campaign with all kinds of fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from .campaign import run_reference
from .driver import Driver, configuration
from .test_short_kills import EPOCHS, assert_kills_change_nothing


@pytest.mark.scenario
def test_killed_workers_score_actor_and_command_change_nothing(tmp_path: Path) -> None:
    reference = Driver(tmp_path / "reference", configuration(EPOCHS, stream="local"))
    run_reference(reference)
    assert_kills_change_nothing(Driver(tmp_path / "killed", configuration(EPOCHS)), reference.folder)
