"""The short form: two cells of the matrix, and two on an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayprune.paths import as_path
from tests.scenarios.kills.driver import running
from tests.support.object_store import BUCKET, object_store

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


@pytest.mark.scenario
def test_killed_training_on_an_object_store_ends_with_the_undisturbed_result_of_a_disk(tmp_path: Path) -> None:
    command = COMMANDS["train"]
    reference = new_driver(command, tmp_path, "reference")
    with running(reference):
        assert finish(reference) == 0, reference.last_output()
    with object_store() as store, store.failing(share=0.02, slow_s=0.01):
        for process, outcome in (("driver", "ended by SIGKILL"), ("score_actor", "continues"), ("worker", "continues")):
            cell = run_cell(command, process, "SIGKILL", tmp_path, reference.storage, as_path(BUCKET))
            assert cell is not None
            assert (cell.outcome, cell.differences) == (outcome, ())
