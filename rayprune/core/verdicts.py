"""Is pruning worth it? Paired differences over seeds, their intervals, and what follows from them.

Arms share their seeds, so an arm is compared with another seed by seed: the mean of the differences with the interval
of Student's t for paired samples. "As good" is a claim too: it takes an interval that lies above minus the margin
(non-inferiority), not merely one that covers 0. Accuracies are in points, 0 to 100.

Shapes: S seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Outcome = Literal["worth it", "prune nothing", "no scores needed", "undecided"]
_LEAST_SAVED = 0.05  # a method that surely saves a smaller share of the seconds counts as no faster
# Baselines that cost what a method costs: everything in fewer epochs, and subsets that no score chose.
SHORTENED = {"full_time": "time", "full_steps": "samples trained"}
CONTROLS = ("random", "random_epoch", "shuffled")


@dataclass(frozen=True)
class Difference:
    """One arm minus another, or its share of another, seed by seed.

    Attributes:
        mean: over the seeds.
        low, high: the interval's ends; None with a single seed.
        num_seeds: S.
    """

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above a bound; never without an interval."""
        return self.low is not None and self.low > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below a bound; never without an interval."""
        return self.high is not None and self.high < bound

    def __str__(self) -> str:
        ends = "no interval" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"
        return f"{self.mean:+.2f} points ({ends})"


@dataclass(frozen=True)
class Verdict:
    """What a comparison says of one method, or of all.

    Attributes:
        outcome: what to do.
        sentence: why, with the numbers.
    """

    outcome: Outcome
    sentence: str


@dataclass(frozen=True)
class Standing:
    """An arm over all seeds, as verdicts see it.

    Attributes:
        name: the arm.
        baseline: which of the baselines it is; "method" for a method.
        accuracy_S: in points, one a seed, in the order of the seeds.
        seconds_S: of the seeds that were timed, in their order; one of them gives a ratio without an interval.
        same_as_full: nothing was left out or shortened: it costs what full training does, and is no rival.
        caveat: what its seconds leave out, in words.
    """

    name: str
    baseline: str
    accuracy_S: Sequence[float]
    seconds_S: Sequence[float]
    same_as_full: bool = False
    caveat: str = ""


def paired_difference(
    one_S: Sequence[float], other_S: Sequence[float], confidence: float, least_sd: float = 0.0
) -> Difference:
    """Return the mean of one − other over seeds, with the interval of the paired t-test.

    Args:
        one_S, other_S: what two arms reached, in the same order of seeds; at least one seed.
        confidence: of the interval, in (0, 1).
        least_sd: what the differences' standard deviation is taken for where it is less.

    >>> str(paired_difference([91.0, 92.0, 93.0], [90.0, 92.0, 91.0], 0.95))
    '+1.00 points (-1.48 to +3.48)'
    """
    differences_S = np.subtract(one_S, other_S, dtype=np.float64)
    mean, count = float(differences_S.mean()), differences_S.size
    if count == 1:
        return Difference(mean, None, None, 1)
    from scipy.stats import t

    deviation = max(float(differences_S.std(ddof=1)), least_sd)
    half = float(t.ppf((1.0 + confidence) / 2.0, count - 1)) * deviation / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def paired_ratio(one_S: Sequence[float], other_S: Sequence[float], confidence: float) -> Difference:
    """Return the geometric mean of one ÷ other over seeds, with its interval: the paired t-test on logarithms.

    A machine that is slow for a while is so for both arms of a seed, and the ratio stays.

    Args:
        one_S, other_S: above 0, such as seconds, in the same order of seeds.
        confidence: of the interval, in (0, 1).
    """
    logs = paired_difference(np.log(one_S).tolist(), np.log(other_S).tolist(), confidence)
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Difference(math.exp(logs.mean), low, high, logs.num_seeds)


def judge(
    method: Standing,
    full: Standing,
    baselines: Sequence[Standing],
    margin: float,
    confidence: float,
    resolution: float = 0.0,
) -> Verdict:
    """Say whether one method is worth it.

    It has to keep full training's accuracy within the margin, to save seconds (or be better), and to beat what costs
    as much without it: full training shortened, and subsets that no score chose.

    Args:
        method: the arm that is judged.
        full: training on everything.
        baselines: the arms beside it; `ratio_0` and `full` among them are not looked at.
        margin: in points.
        confidence: of the intervals.
        resolution: points that one validation sample is worth: seeds that happen to agree are no more certain than
            accuracies rounded to it (their difference has a standard deviation of resolution / √6).
    """
    least_sd = resolution / math.sqrt(6.0)
    to_full = paired_difference(method.accuracy_S, full.accuracy_S, confidence, least_sd)
    start = f"{method.name} is {to_full} to full"
    if to_full.low is None:
        return Verdict(
            "undecided", f"{start}; one seed gives no interval and shows nothing, name three in compare.seeds"
        )
    time = paired_ratio(method.seconds_S, full.seconds_S, confidence)
    saved, once = 1.0 - time.mean, time.low is None
    # Timed once, alone on the machine: what is beyond the least that counts is taken for a difference.
    faster = time.below(1.0) or (once and saved > _LEAST_SAVED)
    slower = time.above(1.0) or (once and saved < -_LEAST_SAVED)
    no_faster = time.above(1.0 - _LEAST_SAVED) or (once and saved < _LEAST_SAVED)
    cost = f"{saved:.0%} of the seconds saved" if saved > 0 else f"{-saved:.0%} more seconds"
    doubt = " (timed once)" if once else "" if faster or slower else " (within the noise of the seeds)"
    start = f"{start}, {cost}{doubt}{method.caveat}"
    if to_full.below(-margin):
        return Verdict("prune nothing", f"{start}: a loss beyond the margin of {margin:g}")
    if no_faster and not to_full.above(0.0):
        return Verdict("prune nothing", f"{start}: no better, and not faster")
    if slower and to_full.above(0.0):
        more = "better, and dearer than anything beside it: compare it with full training of as many epochs more"
        return Verdict("undecided", f"{start}: {more}")
    rivals = [
        Rival(
            arm,
            paired_difference(method.accuracy_S, arm.accuracy_S, confidence, least_sd),
            paired_difference(arm.accuracy_S, full.accuracy_S, confidence, least_sd),
        )
        for arm in sorted(baselines, key=lambda arm: -float(np.mean(arm.accuracy_S)))
        if (arm.baseline in SHORTENED or arm.baseline in CONTROLS) and not arm.same_as_full
    ]
    return _against(rivals, start, to_full, margin, faster or to_full.above(0.0))


@dataclass(frozen=True)
class Rival:
    """An arm that costs what the method costs, the method minus it, and it minus full training."""

    arm: Standing
    difference: Difference
    to_full: Difference


def _against(rivals: Sequence[Rival], start: str, to_full: Difference, margin: float, gains: bool) -> Verdict:
    """Go on with a method that saves something, or is better than full: is it the selection that does it?"""
    as_good = [rival for rival in rivals if rival.difference.below(margin)]
    # Shortened training comes first: where it is as good, nothing need be selected, whatever full training reaches.
    for baseline, words in SHORTENED.items():
        for rival in as_good:
            if rival.arm.baseline == baseline:
                more = (
                    f"full training shortened to the same {words} is as good (the method is {rival.difference} to it)"
                )
                return Verdict("prune nothing", f"{start}; {more}")
    if not to_full.above(-margin):
        more = f"{to_full.num_seeds} seeds do not show whether that is within the margin of {margin:g}"
        return Verdict("undecided", f"{start}: {more}")
    if as_good:
        # As good as the method, which is as good as full: that allows twice the margin, so it must hold by itself.
        safe = [rival for rival in as_good if rival.to_full.above(-margin)]
        first = (safe or as_good)[0]
        more = f"{first.arm.name} is as good (the method is {first.difference} to it)"
        if not safe:
            return Verdict("undecided", f"{start}; {more}, but not shown to keep full training's ({first.to_full})")
        return Verdict("no scores needed", f"{start}; {more}: the scores are worth less than the margin here")
    unbeaten = [rival for rival in rivals if not rival.difference.above(0.0)]
    if unbeaten:
        more = f"it is not shown to be better than {unbeaten[0].arm.name} ({unbeaten[0].difference} to it)"
        return Verdict("undecided", f"{start}; {more}")
    if not rivals:
        more = "no baseline of the same cost ran (compare.baselines, or it saves less than half an epoch)"
        return Verdict("undecided", f"{start}; {more}")
    if not gains:
        return Verdict("undecided", f"{start}; {to_full.num_seeds} seeds do not show that it is faster")
    more = f"better than every baseline of the same cost ({rivals[0].difference} to {rivals[0].arm.name})"
    return Verdict("worth it", f"{start}, within the margin of {margin:g}, and {more}")


def overall(verdicts: Mapping[str, Verdict], seeds: Sequence[int]) -> Verdict:
    """Say what to do here, after the verdicts on all methods.

    Args:
        verdicts: method → its verdict, those that save most seconds first.
        seeds: that were run.
    """

    def first(outcome: Outcome, words: str = "") -> Verdict | None:
        found = (v for v in verdicts.values() if v.outcome == outcome and words in v.sentence)
        return next(found, None)

    if verdict := first("worth it"):
        return Verdict(verdict.outcome, f"Prune here: {verdict.sentence}.")
    if verdict := first("no scores needed"):
        return Verdict(verdict.outcome, f"Samples can be left out here without scores: {verdict.sentence}.")
    if verdict := first("undecided"):
        counted = list(seeds) == list(range(len(seeds)))
        more = f"compare.seeds={2 * len(seeds)} goes" if counted else "more of them in compare.seeds go"
        cure = "" if len(seeds) == 1 else f"; {more} on from these runs"
        return Verdict(verdict.outcome, f"Undecided, so prune nothing yet: {verdict.sentence}{cure}.")
    verdict = first("prune nothing", "shortened") or first("prune nothing")
    assert verdict is not None
    return Verdict(verdict.outcome, f"Prune nothing here: {verdict.sentence}.")
