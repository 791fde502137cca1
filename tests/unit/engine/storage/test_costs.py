"""The cost of a run: training, prior scoring in full or in part, without validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayprune.engine.storage.costs import PriorCost, costs_of, forward_flops_of

PRIOR = PriorCost(
    samples_trained=120,
    samples_forwarded=40,
    compute=130.0,
    wall_time=1.0,
    seconds={"epoch": 0.8, "validate": 0.2},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "environment.json").write_text(json.dumps({"forward_flops_per_sample": 7}))
    return tmp_path


def lines(num_epochs: int, prior_cost: PriorCost) -> list[dict[str, Any]]:
    """Return the metrics of a run that trains 80 samples in 0.7 s, and validates for 0.2 s, an epoch."""
    return [
        {
            "samples_trained": prior_cost.samples_trained + 80 * (epoch + 1),
            "samples_forwarded": prior_cost.samples_forwarded,
            "compute": prior_cost.compute + 80.0 * (epoch + 1),
            "wall_time": prior_cost.wall_time + epoch + 1,
            "seconds": {"epoch": 0.9, "validate": 0.2},
            **prior_cost.metrics,
        }
        for epoch in range(num_epochs)
    ]


def test_the_cost_of_training_has_no_validation(folder: Path) -> None:
    costs = costs_of(folder, lines(3, PriorCost()))
    assert (costs.samples_trained, costs.samples_forwarded, costs.compute) == (240, 0, 240.0)
    assert costs.seconds == pytest.approx(3 * 0.7)
    assert costs.wall_time == 3.0


def test_a_scoring_run_counts_in_full(folder: Path) -> None:
    costs = costs_of(folder, lines(3, PRIOR))
    assert (costs.samples_trained, costs.samples_forwarded, costs.compute) == (360, 40, 370.0)
    assert costs.seconds == pytest.approx(3 * 0.7 + 0.6)
    assert costs.wall_time == 4.0


def test_a_shared_scoring_run_counts_in_part(folder: Path) -> None:
    costs = costs_of(folder, lines(3, PRIOR), amortise=4)
    assert (costs.samples_trained, costs.samples_forwarded, costs.compute) == (240 + 30, 10, 272.5)
    assert costs.seconds == pytest.approx(3 * 0.7 + 0.15)
    assert costs.wall_time == 3.25


def test_a_training_step_costs_three_forward_passes(folder: Path) -> None:
    assert forward_flops_of(folder) == 7
    assert costs_of(folder, lines(1, PriorCost())).flops == 3 * 7 * 80


def test_metrics_tell_the_prior_cost_apart() -> None:
    assert PRIOR.metrics == {
        "samples_collected": 120,
        "samples_forwarded_collected": 40,
        "compute_collected": 130.0,
        "wall_time_collected": 1.0,
        "seconds_collected": {"epoch": 0.8, "validate": 0.2},
    }
    assert PriorCost().metrics["seconds_collected"] == {}
