"""InfoBatch: the warning of a run that is too short to prune."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rayprune.core import Selector
from rayprune.core.bases.dynamic import warn_once
from rayprune.methods import build_method


def warnings_of_a_full_run(caplog: pytest.LogCaptureFixture, num_epochs: int, options: dict[str, Any]) -> list[str]:
    warn_once.cache_clear()
    selector = Selector(build_method({"name": "infobatch", **options}), 10, num_epochs)
    with caplog.at_level(logging.WARNING):
        Selector(selector.method, 3, num_epochs).begin_epoch(0)  # a trial, as in the engine's checks before a run
        for epoch in range(num_epochs):
            assert selector.begin_epoch(epoch).num_kept == 10
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("num_epochs", "options"),
    [
        (1, {}),
        (2, {}),
        (8, {"anneal_start": 0.1}),
        (2, {"quantiles": [50], "keep": [0.5]}),
        (2, {"prune_ratio": {"schedule": "linear", "start": 0.0, "end": 0.5}}),
    ],
)
def test_a_run_too_short_to_prune_warns_once(
    num_epochs: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = warnings_of_a_full_run(caplog, num_epochs, options)
    assert line.startswith(f"infobatch never prunes with num_epochs = {num_epochs}: epoch 0 is full")
    assert "anneal_start" in line
    assert "\n" not in line


@pytest.mark.parametrize(("num_epochs", "options"), [(3, {}), (2, {"prune_ratio": 0}), (2, {"anneal_start": 1.0})])
def test_a_run_that_may_prune_or_requests_no_pruning_does_not_warn(
    num_epochs: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of_a_full_run(caplog, num_epochs, options) == []
