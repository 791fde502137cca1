"""The short form: a few random examples of each target. `python -m tests.scenarios.fuzz` runs more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .sandbox import Limits, Sandbox
from .targets import TARGETS, run_example


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(Limits(seconds=30)) as started:
        yield started


@pytest.fixture(scope="module", params=list(TARGETS))
def good(
    request: pytest.FixtureRequest, sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    TARGETS[request.param].make(folder, sandbox)
    return request.param, folder


@settings(max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_damage_is_survived_or_refused_in_one_line(
    good: tuple[str, Path], sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    name, folder = good
    example = run_example(TARGETS[name], folder, tmp_path_factory.getbasetemp() / "example", sandbox, seed)
    assert not example.problems, str(example)
