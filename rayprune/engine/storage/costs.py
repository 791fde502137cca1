"""The cost of a run, read from its folder; a scoring run counts in full or in part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A training step is a forward pass and a backward pass of twice the work.
FORWARDS_PER_STEP = 3


@dataclass(frozen=True)
class PriorCost:
    """The cost of the run that scored a run's samples before it began; zero where there was none.

    Attributes:
        samples_trained, samples_forwarded, samples_padded, bytes_read, samples_meta, samples_skipped: as in
            metrics.jsonl.
        compute: in samples trained.
        wall_time: seconds.
        seconds: phase → seconds, summed over the epochs.
    """

    samples_trained: int = 0
    samples_forwarded: int = 0
    samples_padded: int = 0
    bytes_read: int = 0
    samples_meta: int = 0
    samples_skipped: int = 0
    compute: float = 0.0
    wall_time: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def sum(cls, costs: Sequence[PriorCost]) -> PriorCost:
        """Add up the costs of several scoring runs."""
        totals = {name: sum(getattr(cost, name) for cost in costs) for name in vars(cls()) if name != "seconds"}
        phases = dict.fromkeys(phase for cost in costs for phase in cost.seconds)
        return cls(**totals, seconds={phase: sum(cost.seconds.get(phase, 0.0) for cost in costs) for phase in phases})

    @property
    def counts(self) -> dict[str, int]:
        """The counts that the run adds its own to."""
        samples = ("trained", "forwarded", "padded", "meta", "skipped")
        return {name: getattr(self, name) for name in ("bytes_read", *(f"samples_{kind}" for kind in samples))}

    @property
    def metrics(self) -> dict[str, Any]:
        """The fields of each line of metrics.jsonl that tell the prior cost apart from the totals."""
        return {
            "samples_collected": self.samples_trained,
            "samples_forwarded_collected": self.samples_forwarded,
            "compute_collected": self.compute,
            "wall_time_collected": self.wall_time,
            "seconds_collected": dict(self.seconds),
        }


@dataclass(frozen=True)
class Costs:
    """The cost of a run.

    Attributes:
        samples_trained, samples_forwarded: rows of forward and backward passes, and of forward passes alone.
        compute: in samples trained.
        flops: floating-point operations, from torch's count of one forward pass.
        seconds: of training, selection and checkpoints, without validation.
        wall_time: total seconds.
    """

    samples_trained: int
    samples_forwarded: int
    compute: float
    flops: float
    seconds: float
    wall_time: float


def costs_of(folder: Path, metrics: Sequence[dict[str, Any]], amortise: int = 1) -> Costs:
    """Add up the cost of a run.

    Args:
        folder: of the run.
        metrics: the lines of its metrics.jsonl, at least one.
        amortise: the number of trainings that use the same scoring run; each bears an equal part of its cost.
    """
    last, share = metrics[-1], 1.0 / amortise

    def total(name: str, prior: str) -> float:
        return float(last[name] - (1.0 - share) * last[prior])

    compute = total("compute", "compute_collected")
    return Costs(
        samples_trained=round(total("samples_trained", "samples_collected")),
        samples_forwarded=round(total("samples_forwarded", "samples_forwarded_collected")),
        compute=round(compute, 1),
        flops=FORWARDS_PER_STEP * forward_flops_of(folder) * compute,
        seconds=sum(_working(line["seconds"]) for line in metrics) + share * _working(last["seconds_collected"]),
        wall_time=total("wall_time", "wall_time_collected"),
    )


def _working(seconds: Mapping[str, float]) -> float:
    return float(seconds.get("epoch", 0.0) - seconds.get("validate", 0.0))


def forward_flops_of(folder: Path) -> int:
    """Return the floating-point operations of one sample's forward pass in a run."""
    return int(json.loads((folder / "environment.json").read_text())["forward_flops_per_sample"])
