"""The short form: two cells of the matrix."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.kills.driver import running

from .cells import finish, new_driver, run_cell
from .commands import COMMANDS


@pytest.mark.scenario
def test_disturbed_training_ends_with_the_undisturbed_result(tmp_path: Path) -> None:
    command = COMMANDS["train"]
    reference = new_driver(command, tmp_path, "reference")
    with running(reference):
        assert finish(reference) == 0, reference.last_output()
    expected = {
        ("raylet", "SIGKILL"): "exit 1: `error: Ray's process raylet was ended by SIGKILL",
        ("driver", "SIGTERM to its group"): "exit 1: `error: paused: saved before step",
    }
    for (process, disturbance), outcome in expected.items():
        cell = run_cell(command, process, disturbance, tmp_path, reference.storage)
        assert cell is not None
        assert cell.outcome.startswith(outcome)
        assert (cell.lines, cell.differences) == (1, ())
