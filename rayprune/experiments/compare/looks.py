"""Looks: how often a comparison was judged, how strict the next look is, and how many seeds it needs."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from rayprune.config.experiments import CompareSection
from rayprune.errors import ConfigError, RunFolderError
from rayprune.experiments.compare.statistics import (
    ArmRuns,
    Difference,
    crossed_difference,
    crossed_mean,
    paired_ratio,
    same_runs,
    t_quantile,
)

_CHURN = 0.1  # guessed fraction of the validation samples on which two runs disagree
_POWER = 0.8
_MOST_SEEDS = 1000
_MOST_HALVINGS = 40  # more would round the confidence to 1


@dataclass(frozen=True)
class Criteria:
    """The decision criteria of a comparison.

    A verdict is a one-sided claim on the ends of intervals. The first look at a single method uses intervals of
    `confidence`. Look k at m methods uses 1 − (1 − confidence)/(m·2^(k−1)). The probability of a wrong claim, over all
    methods and any number of looks, is then at most 1 − confidence, the sum over k of (1 − confidence)/2^k. A claim
    that some arm of r has a property is r claims, which share the rate.

    Attributes:
        margin: loss of accuracy against full training that counts as none, in points.
        rival_margin: advantage over a baseline of the same cost that counts as none, in points.
        confidence: of the first look at a single method, in (0, 1).
        look: k, from 1; how many times the comparison has been judged, this time included.
        num_methods: m.
        time_look: as `look`, for the ratios of seconds. Looks that add no timed seeds do not count.
    """

    margin: float
    rival_margin: float
    confidence: float
    look: int = 1
    num_methods: int = 1
    time_look: int = 1

    @property
    def interval_confidence(self) -> float:
        """The confidence of this look's intervals."""
        return self._confidence_at(self.look)

    def _confidence_at(self, look: int, num_claims: int = 1) -> float:
        parts = self.num_methods * num_claims * 2 ** min(look - 1, _MOST_HALVINGS)
        return 1.0 - (1.0 - self.confidence) / parts

    def any_of(self, num_arms: int) -> Criteria:
        """Return the criteria for a claim that some arm of several has a property."""
        return dataclasses.replace(self, confidence=self._confidence_at(1, max(num_arms, 1)), num_methods=1)

    def difference(self, one: ArmRuns, other: ArmRuns) -> Difference:
        """Return the accuracy of one arm minus another's; without an interval if their runs are the same."""
        if same_runs(one, other):
            return Difference(0.0, None, None)
        return crossed_difference(one.correct_SV, other.correct_SV, self.interval_confidence)

    def lead_beyond_loss(self, method: ArmRuns, rival: ArmRuns, full: ArmRuns) -> Difference:
        """Return by how much a method's lead over a rival exceeds its loss against full training."""
        method_SV, rival_SV, full_SV = (arm.correct_SV.astype(np.int8) for arm in (method, rival, full))
        return crossed_mean(2 * method_SV - rival_SV - full_SV, self.interval_confidence)

    def time_ratio(self, one: ArmRuns, full: ArmRuns) -> Difference:
        """Return the ratio of the seconds of an arm to those of full training."""
        return paired_ratio(one.seconds, full.seconds, self._confidence_at(self.time_look))


def criteria_of(section: CompareSection, num_methods: int) -> Criteria:
    """Return the criteria of a config's first look."""
    rival_margin = section.margin if section.rival_margin is None else section.rival_margin
    return Criteria(section.margin, rival_margin, section.confidence, num_methods=num_methods)


class Look(BaseModel):
    """One judgment of a comparison.

    Attributes:
        seeds: sorted.
        timed_seeds: those whose seconds counted.
        margin, rival_margin: in points.
        runs: hash of the names of the run folders.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: tuple[int, ...]
    timed_seeds: tuple[int, ...]
    margin: float
    rival_margin: float
    runs: str


class _Errors(BaseModel):
    seed_se: float
    sample_se: float
    num_seeds: int


class _JudgedArm(BaseModel):
    baseline: str
    to_full: _Errors


class _Judged(BaseModel):
    """What a comparison reads of its own compare.json."""

    seeds: tuple[int, ...]
    first_confidence: float
    looks: tuple[Look, ...]
    arms: tuple[_JudgedArm, ...]

    @property
    def spread(self) -> tuple[float, float]:
        """The largest standard deviation over seeds of a method minus full, with its standard error over samples."""
        methods = [arm.to_full for arm in self.arms if arm.baseline == "method"]
        largest = max(methods, key=lambda method: method.seed_se)
        return largest.seed_se * math.sqrt(largest.num_seeds), largest.sample_se


class Looks:
    """The looks that a comparison's folder records.

    Args:
        folder: the comparison's folder; it need not exist.
        section: the config's section `compare`.

    Raises:
        RunFolderError: compare.json is damaged.
        ConfigError: seeds that were judged are left out, or `confidence` has changed.
    """

    def __init__(self, folder: Path, section: CompareSection) -> None:
        self._section = section
        self._judged = _read(folder / "compare.json")
        self._past = () if self._judged is None else self._judged.looks
        seeds = tuple(sorted(section.all_seeds))
        before = {seed for look in self._past for seed in look.seeds}
        if before - set(seeds) and seeds not in [look.seeds for look in self._past]:
            missing = ", ".join(map(str, sorted(before - set(seeds))))
            raise ConfigError(
                f"compare.seeds leaves out seeds that this comparison was judged with ({missing}): choosing among "
                "seeds after seeing their results would raise the rate of wrong verdicts; name them, too"
            )
        if self._judged is not None and self._judged.first_confidence != section.confidence:
            raise ConfigError(
                f"compare.confidence = {section.confidence:g}: this comparison began with "
                f"{self._judged.first_confidence:g}; keep it, or choose another run.name"
            )

    def judge(self, criteria: Criteria, arms: Sequence[ArmRuns]) -> tuple[Criteria, list[dict[str, Any]]]:
        """Return the criteria of this look, and the record of all looks.

        A look at the same runs with the same margins is the same look. A single seed decides nothing and is none.

        Args:
            criteria: of the first look.
            arms: the runs to judge.
        """
        seeds = [run.seed for run in arms[0].runs]
        names = sorted(run.folder for arm in arms for run in arm.runs)
        look = Look(
            seeds=tuple(sorted(seeds)),
            timed_seeds=tuple(sorted(seeds[place] for place in arms[0].timed)),
            margin=criteria.margin,
            rival_margin=criteria.rival_margin,
            runs=hashlib.sha256("\n".join(names).encode()).hexdigest()[:12],
        )
        past = list(self._past)
        number = past.index(look) + 1 if look in past else len(past) + 1
        timed = list(dict.fromkeys((*(old.timed_seeds for old in past[: number - 1]), look.timed_seeds)))
        time_look = next(place for place, seeds in enumerate(timed, 1) if set(look.timed_seeds) <= set(seeds))
        record = past if look in past or len(seeds) == 1 else [*past, look]
        judged = dataclasses.replace(criteria, look=number, time_look=time_look)
        return judged, [old.model_dump(mode="json") for old in record]

    def notices(self, criteria: Criteria, num_samples: int) -> Iterator[str]:
        """Yield a line on how many seeds the margin needs, by the variances observed in this comparison or guessed."""
        sd, sample_se, source = _guessed(num_samples)
        if self._judged is not None and len(self._judged.seeds) > 1:
            (sd, sample_se), source = self._judged.spread, "observed so far"
        needed = seeds_for_margin(criteria.margin, sd, sample_se, criteria.interval_confidence)
        if needed is None:
            yield (
                f"no number of seeds up to {_MOST_SEEDS:,} is likely to show a margin of {criteria.margin:g} with "
                f"{num_samples:,} validation samples: use more of them, or a wider margin"
            )
        else:
            spread = f"if seeds spread a difference by {sd:.2g} points ({source})"
            count = len(self._section.all_seeds)
            yield f"a margin of {criteria.margin:g} needs about {needed} seeds, {spread}; compare.seeds has {count}"


def _read(file: Path) -> _Judged | None:
    if not file.exists():
        return None
    try:
        return _Judged.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise RunFolderError(
            f"{file}, which records how often this comparison was judged, can't be read ({place}: {first['msg']}): "
            "restore it, or choose another run.name"
        ) from None


def _guessed(num_samples: int) -> tuple[float, float, str]:
    """Return a standard deviation over seeds, a standard error over samples, in points, and where they come from."""
    sd, sample_se = 100.0 * math.sqrt(_CHURN / num_samples), 100.0 * math.sqrt(_CHURN * _CHURN / num_samples)
    return sd, sample_se, f"guessed from {num_samples:,} validation samples"


def seeds_for_margin(margin: float, sd: float, sample_se: float, confidence: float) -> int | None:
    """Return how many seeds show that equal accuracies are within a margin, in four of five comparisons.

    Args:
        margin: in points.
        sd: standard deviation over seeds of the difference, in points.
        sample_se: its standard error over validation samples, in points.
        confidence: of the intervals, in (0, 1).

    Returns:
        The number of seeds, None above 1,000.

    >>> seeds_for_margin(1.0, 1.0, 0.0, 0.95)
    10
    """
    tail = (1.0 + confidence) / 2.0
    for num_seeds in range(2, _MOST_SEEDS + 1):
        seed_se, freedom = sd / math.sqrt(num_seeds), num_seeds - 1
        half = math.hypot(t_quantile(tail, freedom) * seed_se, t_quantile(tail, None) * sample_se)
        slack = math.hypot(t_quantile(_POWER, freedom) * seed_se, t_quantile(_POWER, None) * sample_se)
        if half + slack <= margin:
            return num_seeds
    return None
