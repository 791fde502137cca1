"""What a run has cost so far, out of its folder: the scoring run of a static method with it, whole or in part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A training step is a forward pass and a backward one of twice the work.
FORWARDS_PER_STEP = 3


@dataclass(frozen=True)
class Costs:
    """What a run has cost.

    Attributes:
        samples_trained, samples_forwarded: rows that went forward and backward, and forward only.
        compute: in samples trained.
        flops: floating-point operations, by torch's counter of one forward pass; 0 where its folder does not tell.
        seconds: of training, selection and checkpoints, without validation.
        wall_time: seconds in all.
    """

    samples_trained: int
    samples_forwarded: int
    compute: float
    flops: float
    seconds: float
    wall_time: float


def costs_of(folder: Path, metrics: Sequence[dict[str, Any]], amortise: int = 1) -> Costs:
    """Add up what a run has cost.

    Args:
        folder: of the run.
        metrics: the lines of its metrics.jsonl so far, at least one.
        amortise: trainings that share a scoring run's cost: each bears one part in so many.
    """
    last = metrics[-1]
    left_out = 1.0 - 1.0 / amortise  # of what was collected
    collected = last.get("seconds_collected") or {}

    def less(total: str, part: str) -> float:
        return float(last[total] - left_out * last.get(part, 0))

    own = sum(_working(line["seconds"]) for line in metrics)
    compute = less("compute", "compute_collected")
    return Costs(
        samples_trained=round(less("samples_trained", "samples_collected")),
        samples_forwarded=round(less("samples_forwarded", "samples_forwarded_collected")),
        compute=round(compute, 1),
        flops=FORWARDS_PER_STEP * forward_flops_of(folder) * compute,
        seconds=own + (1.0 - left_out) * _working(collected),
        wall_time=less("wall_time", "wall_time_collected"),
    )


def _working(seconds: dict[str, float]) -> float:
    return float(seconds.get("epoch", 0.0) - seconds.get("validate", 0.0))


def forward_flops_of(folder: Path) -> int:
    """Return the floating-point operations of one sample's forward pass, as the run's folder tells; 0 where not."""
    environment = folder / "environment.json"
    return int(json.loads(environment.read_text()).get("forward_flops_per_sample", 0)) if environment.exists() else 0


@dataclass(frozen=True)
class PriorCost:
    """What was spent on a run's samples before it began: by the run that scored them.

    Attributes:
        samples_trained, samples_forwarded, samples_padded, bytes_read, samples_meta: as in metrics.jsonl.
        compute: in samples trained.
        wall_time: seconds.
        seconds: where they went, summed over its epochs.
    """

    samples_trained: int = 0
    samples_forwarded: int = 0
    samples_padded: int = 0
    bytes_read: int = 0
    samples_meta: int = 0
    compute: float = 0.0
    wall_time: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
