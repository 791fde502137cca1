"""What finished runs say of the arms they belong to: means, paired differences, verdicts, as plain JSON types.

Shapes: S seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayprune.core.verdicts import (
    SHORTENED,
    Difference,
    Standing,
    Verdict,
    judge,
    overall,
    paired_difference,
    paired_ratio,
)

# The same work in such different times is told: something else ran on the machine.
_UNEVEN = 1.25


@dataclass(frozen=True)
class RunOutcome:
    """What one run reached and spent.

    Attributes:
        seed: of the run.
        folder: its name.
        epochs: how many it trained.
        matched: what its length or ratio was matched to, in words.
        accuracy: on the validation part after the last epoch, in points.
        worst_class: that of the class with the lowest, in points.
        samples_trained, samples_forwarded: with those of a run that scored.
        compute: in samples trained.
        flops: floating-point operations of training.
        seconds: of training, selection and checkpoints, without validation.
        alone: nothing else of the comparison ran beside it: its seconds count.
    """

    seed: int
    folder: str
    epochs: int
    matched: str
    accuracy: float
    worst_class: float
    samples_trained: int
    samples_forwarded: int
    compute: float
    flops: float
    seconds: float
    alone: bool = True


@dataclass(frozen=True)
class ArmRuns:
    """An arm's runs, one a seed, in the same order of seeds for all arms."""

    name: str
    baseline: str
    method_arm: str
    runs: Sequence[RunOutcome]
    caveat: str = ""

    def column(self, name: str) -> list[float]:
        """Return an attribute of every run."""
        return [float(getattr(run, name)) for run in self.runs]

    def mean(self, name: str) -> float:
        """Return the mean of an attribute over the runs."""
        return float(np.mean(self.column(name)))

    def seconds(self, timed: Sequence[int]) -> list[float]:
        """Return the seconds of the runs at these places."""
        return [self.runs[place].seconds for place in timed]

    def standing(self, timed: Sequence[int]) -> Standing:
        """Return what verdicts look at, the seconds of the runs at these places."""
        borrowed = self.baseline != "full" and all(run.folder.startswith("full-seed") for run in self.runs)
        return Standing(self.name, self.baseline, self.column("accuracy"), self.seconds(timed), borrowed, self.caveat)


def timed_places(arms: Sequence[ArmRuns]) -> list[int]:
    """Return the places of the seeds whose runs, of all arms, had the machine to themselves; all where none had."""
    places = range(len(arms[0].runs))
    return [place for place in places if all(arm.runs[place].alone for arm in arms)] or list(places)


@dataclass(frozen=True)
class _Terms:
    """What all rows and verdicts of a comparison share; see `summary`."""

    margin: float
    confidence: float
    resolution: float
    timed: Sequence[int]

    def difference(self, one: ArmRuns, other: ArmRuns, name: str) -> Difference:
        """Return one arm minus another, no more certain than samples allow; no interval if they are one."""
        if self.same_runs(one, other):
            return Difference(0.0, None, None, len(one.runs))
        least_sd = self.resolution / math.sqrt(6.0) if name == "accuracy" else 0.0
        return paired_difference(one.column(name), other.column(name), self.confidence, least_sd)

    def same_runs(self, one: ArmRuns, other: ArmRuns) -> bool:
        """Whether two arms are one: what was matched came to the same."""
        return [run.folder for run in one.runs] == [run.folder for run in other.runs]


def summary(arms: Sequence[ArmRuns], margin: float, confidence: float, resolution: float = 0.0) -> dict[str, Any]:
    """Return the arms with their differences to full training, and the verdicts on the methods.

    Args:
        arms: the first one is full training.
        margin: of non-inferiority, in points.
        confidence: of the intervals.
        resolution: points that one validation sample is worth.

    Returns:
        Seeds, arms, verdicts; `timed_seeds` are those whose seconds count; `uneven_seconds` are the least and the most
        seconds that an epoch on everything took, in any arm, where they lie far apart.
    """
    full = arms[0]
    terms = _Terms(margin, confidence, resolution, timed_places(arms))
    methods = [arm for arm in arms if arm.baseline == "method"]
    judged = {arm.name: _judged(arm, full, arms, terms) for arm in methods}
    by_saving = sorted(methods, key=lambda arm: sum(arm.seconds(terms.timed)))
    verdicts = {arm.name: Verdict(judged[arm.name]["outcome"], judged[arm.name]["sentence"]) for arm in by_saving}
    final = overall(verdicts, [run.seed for run in full.runs])
    alike = [arm for arm in arms if arm.baseline in ("full", *SHORTENED)]
    epochs = [arm.runs[place].seconds / arm.runs[place].epochs for arm in alike for place in terms.timed]
    fastest, slowest = min(epochs), max(epochs)
    return {
        "uneven_seconds": [fastest, slowest] if slowest > _UNEVEN * fastest else None,
        "seeds": [run.seed for run in full.runs],
        "timed_seeds": [full.runs[place].seed for place in terms.timed],
        "margin": margin,
        "confidence": confidence,
        "arms": [_arm_row(arm, full, terms) for arm in arms],
        "methods": judged,
        "verdict": {"outcome": final.outcome, "sentence": final.sentence},
    }


def _arm_row(arm: ArmRuns, full: ArmRuns, terms: _Terms) -> dict[str, Any]:
    several, confidence = len(arm.runs) > 1, terms.confidence
    own, whole = arm.seconds(terms.timed), full.seconds(terms.timed)
    to_full = terms.difference(arm, full, "accuracy")
    return {
        "name": arm.name,
        "baseline": arm.baseline,
        "method_arm": arm.method_arm,
        "matched": arm.runs[0].matched,
        "accuracy": arm.mean("accuracy"),
        "accuracy_sd": float(np.std(arm.column("accuracy"), ddof=1)) if several else None,
        "worst_class": arm.mean("worst_class"),
        "to_full": _plain(to_full),
        "non_inferior": (to_full.above(-terms.margin) or terms.same_runs(arm, full)) if several else None,
        "worst_class_to_full": _plain(terms.difference(arm, full, "worst_class")),
        "epochs": sorted({run.epochs for run in arm.runs}),
        **{name: arm.mean(name) for name in ("samples_trained", "samples_forwarded", "compute", "flops")},
        "seconds": float(np.mean(own)),
        **{f"{name}_saved": 1.0 - arm.mean(name) / full.mean(name) for name in ("samples_trained", "compute")},
        "seconds_to_full": _plain(paired_ratio(own, whole, confidence)),
        "runs": [dataclasses.asdict(run) for run in arm.runs],
    }


def _judged(arm: ArmRuns, full: ArmRuns, arms: Sequence[ArmRuns], terms: _Terms) -> dict[str, Any]:
    """Return a method's verdict, and its difference to each of its baselines, the strongest first."""
    own = [other for other in arms if other.method_arm == arm.name and other is not arm]
    own.sort(key=lambda other: -other.mean("accuracy"))
    verdict = judge(
        arm.standing(terms.timed),
        full.standing(terms.timed),
        [other.standing(terms.timed) for other in own],
        terms.margin,
        terms.confidence,
        terms.resolution,
    )
    against: Mapping[str, Any] = {other.name: _plain(terms.difference(arm, other, "accuracy")) for other in own}
    rivals = [other.name for other in own if other.baseline != "ratio_0"]
    return {
        "outcome": verdict.outcome,
        "sentence": verdict.sentence,
        "strongest_baseline": rivals[0] if rivals else None,
        "to_baselines": dict(against),
    }


def _plain(difference: Difference) -> dict[str, float | None]:
    return {"mean": difference.mean, "low": difference.low, "high": difference.high}
