"""What finished runs say of the arms they belong to: means, paired differences, verdicts, as plain JSON types.

Shapes: S seeds.

Is pruning worth it? Paired differences over seeds, their intervals, and what follows from them.

Arms share their seeds, so an arm is compared with another seed by seed: the mean of the differences with the interval
of Student's t for paired samples. "As good" is a claim too: it takes an interval that lies above minus the margin
(non-inferiority), not merely one that covers 0. Accuracies are in points, 0 to 100.

Shapes: S seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
