"""A run with workers in a folder of someone else's: Ray's workers and actors import nothing of it unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command_line import rayprune
from tests.support.foreign_folder import imported, make_foreign, write_own


@pytest.fixture(scope="module", autouse=True)
def cluster() -> None:
    """The command starts its own Ray."""


def test_workers_load_references_to_the_current_folder_and_no_library_from_it(tmp_path: Path) -> None:
    make_foreign(tmp_path)
    config = str(write_own(tmp_path))
    done = rayprune("train", config, "scaling.num_workers=1", "scaling.stream=ray", "run.address=local", cwd=tmp_path)
    assert (done.returncode, done.stderr, imported(tmp_path)) == (0, "", [])
    assert "full on own, net, 1 worker, stream ray" in done.stdout
