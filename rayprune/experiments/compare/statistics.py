"""Paired differences over seeds, their intervals, and the verdicts that follow from them.

Arms share their seeds and are compared seed by seed: the mean of the differences has the interval of Student's t for
paired samples. To call an arm as good as another requires an interval above minus the margin (non-inferiority), not
merely one that covers 0. Accuracies are in points, 0 to 100.

Shapes: S seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Outcome = Literal["worth it", "prune nothing", "no scores needed", "undecided"]
_LEAST_SAVED = 0.05  # a method that saves a smaller fraction of the seconds counts as not faster
# Full training in fewer epochs, at the cost of a method.
SHORTENED = {"full_time": "time", "full_steps": "samples trained"}
_MEANS = ("samples_trained", "samples_forwarded", "compute", "flops", "learning_rate", "mean_step_scale")
_ALIKE = 0.03  # two amounts of training that differ by a smaller fraction should give the same accuracy
_UNEVEN = 1.25  # if equal work differs in time by this factor, something else ran on the machine


@dataclass(frozen=True)
class RunOutcome:
    """The result and the cost of one run.

    Attributes:
        seed: of the run.
        folder: name of the run folder.
        epochs: number of epochs.
        matched: what its length or ratio was matched to, in words.
        accuracy: on the validation part after the last epoch, in points.
        worst_class: the lowest accuracy of a class, in points.
        samples_trained, samples_forwarded: including those of a scoring run.
        compute: in samples trained.
        flops: floating-point operations of training.
        seconds: of training, selection and checkpoints, without validation.
        learning_rate: the peak.
        mean_step_scale: the mean size of its steps relative to full training's: learning rate times the mean weight of
            the trained samples. AdamW normalizes gradients, so the weights do not count there.
        alone: whether no other run of the comparison ran at the same time, so that its seconds count.
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
    learning_rate: float
    mean_step_scale: float
    alone: bool = True


@dataclass(frozen=True)
class ArmRuns:
    """An arm's runs, one per seed, in the same order of seeds for all arms.

    Attributes:
        name: of the arm.
        baseline: name of the baseline; "method" for a method.
        method_arm: name of the method's arm: this one, or the one that it is compared with.
        runs: S outcomes.
        timed: positions of the seeds whose seconds count; with one, ratios of seconds have no interval.
        caveat: what its seconds leave out, in words.
    """

    name: str
    baseline: str
    method_arm: str
    runs: Sequence[RunOutcome]
    timed: Sequence[int]
    caveat: str = ""

    def column(self, name: str) -> list[float]:
        """Return an attribute of every run."""
        return [float(getattr(run, name)) for run in self.runs]

    def mean(self, name: str) -> float:
        """Return the mean of an attribute over the runs."""
        return float(np.mean(self.column(name)))

    @property
    def seconds(self) -> list[float]:
        """The seconds of the timed runs."""
        return [self.runs[place].seconds for place in self.timed]

    @property
    def same_as_full(self) -> bool:
        """Whether a matched arm turned out to be full training itself, with its cost."""
        return self.baseline != "full" and all(run.folder.startswith("full-") for run in self.runs)


def timed_places(arms: Iterable[Sequence[RunOutcome]]) -> list[int]:
    """Return the positions of the seeds for which every arm ran alone on the machine; all if there is none."""
    seeds = list(zip(*arms, strict=True))
    return [place for place, runs in enumerate(seeds) if all(run.alone for run in runs)] or list(range(len(seeds)))


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of one arm minus another, or of one divided by another.

    Attributes:
        mean: over the seeds.
        low, high: ends of the interval; None with a single seed.
    """

    mean: float
    low: float | None
    high: float | None

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above a bound; never without an interval."""
        return self.low is not None and self.low > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below a bound; never without an interval."""
        return self.high is not None and self.high < bound

    def __str__(self) -> str:
        ends = "no interval" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"
        return f"{self.mean:+.2f} points ({ends})"


def paired_difference(
    one_S: Sequence[float], other_S: Sequence[float], confidence: float, least_sd: float = 0.0
) -> Difference:
    """Return the mean of one − other over seeds, with the interval of the paired t-test.

    Args:
        one_S, other_S: the results of two arms, in the same order of seeds; at least one seed.
        confidence: of the interval, in (0, 1).
        least_sd: the least standard deviation of the differences to assume.

    >>> str(paired_difference([91.0, 92.0, 93.0], [90.0, 92.0, 91.0], 0.95))
    '+1.00 points (-1.48 to +3.48)'
    """
    differences_S = np.subtract(one_S, other_S, dtype=np.float64)
    mean, count = float(differences_S.mean()), differences_S.size
    if count == 1:
        return Difference(mean, None, None)
    from scipy.stats import t

    deviation = max(float(differences_S.std(ddof=1)), least_sd)
    half = float(t.ppf((1.0 + confidence) / 2.0, count - 1)) * deviation / math.sqrt(count)
    return Difference(mean, mean - half, mean + half)


def paired_ratio(one_S: Sequence[float], other_S: Sequence[float], confidence: float) -> Difference:
    """Return the geometric mean of one ÷ other over seeds, with the interval of the paired t-test on logarithms.

    Ratios cancel a temporary slowdown of the machine, which affects both arms of a seed.

    Args:
        one_S, other_S: above 0, such as seconds, in the same order of seeds.
        confidence: of the interval, in (0, 1).
    """
    logs = paired_difference(np.log(one_S).tolist(), np.log(other_S).tolist(), confidence)
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Difference(math.exp(logs.mean), low, high)


@dataclass(frozen=True)
class Criteria:
    """The decision criteria of a comparison.

    Attributes:
        margin: loss of accuracy that counts as none, in points.
        confidence: of the intervals, in (0, 1).
        resolution: points that one validation sample is worth. Accuracies are rounded to it, so their differences have
            a standard deviation of at least resolution / √6, even if the seeds happen to agree.
    """

    margin: float
    confidence: float
    resolution: float = 0.0

    def difference(self, one: ArmRuns, other: ArmRuns, column: str = "accuracy") -> Difference:
        """Return one arm minus another; without an interval if their runs are the same."""
        if same_runs(one, other):
            return Difference(0.0, None, None)
        least_sd = self.resolution / math.sqrt(6.0) if column == "accuracy" else 0.0
        return paired_difference(one.column(column), other.column(column), self.confidence, least_sd)


def same_runs(one: ArmRuns, other: ArmRuns) -> bool:
    """Return whether two arms have the same runs, as matched arms can."""
    return [run.folder for run in one.runs] == [run.folder for run in other.runs]


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a comparison, for one method or for all.

    Attributes:
        outcome: what to do.
        sentence: why, with the numbers.
    """

    outcome: Outcome
    sentence: str


def judge(method: ArmRuns, full: ArmRuns, baselines: Sequence[ArmRuns], criteria: Criteria) -> Verdict:
    """Decide whether a method is worth it.

    It has to keep full training's accuracy within the margin, to save seconds (or be more accurate), and to beat the
    baselines of the same cost: shortened full training, and subsets selected without scores.

    Args:
        method: the arm of the method.
        full: training on all samples.
        baselines: the arms to compare with; `ratio_0` among them is ignored.
        criteria: margin and confidence.
    """
    margin = criteria.margin
    to_full = criteria.difference(method, full)
    start = f"{method.name} differs from full by {to_full}"
    if to_full.low is None:
        return Verdict(
            "undecided", f"{start}; one seed gives no interval and shows nothing, name three in compare.seeds"
        )
    time = paired_ratio(method.seconds, full.seconds, criteria.confidence)
    saved, once = 1.0 - time.mean, time.low is None
    # Timed once, alone on the machine: take any saving above the minimum as a difference.
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
        more = "better, and more expensive than every baseline: compare it with full training for more epochs"
        return Verdict("undecided", f"{start}: {more}")
    rivals = [
        _Rival(arm, criteria.difference(method, arm), criteria.difference(arm, full))
        for arm in sorted(baselines, key=lambda arm: -arm.mean("accuracy"))
        if arm.baseline != "ratio_0" and not arm.same_as_full
    ]
    verdict = _judge_against(rivals, to_full, criteria, num_seeds=len(full.runs), gains=faster or to_full.above(0.0))
    return dataclasses.replace(verdict, sentence=f"{start}{verdict.sentence}")


@dataclass(frozen=True)
class _Rival:
    """An arm of the method's cost, the method minus this arm, and this arm minus full training."""

    arm: ArmRuns
    difference: Difference
    to_full: Difference


def _judge_against(
    rivals: Sequence[_Rival], to_full: Difference, criteria: Criteria, *, num_seeds: int, gains: bool
) -> Verdict:
    """Decide whether a method's gain is due to its selection; the sentence continues that of `judge`."""
    margin = criteria.margin
    as_good = [rival for rival in rivals if rival.difference.below(margin)]
    # Check shortened training first: if it is as good, no selection is needed, however good full training is.
    for baseline, words in SHORTENED.items():
        for rival in as_good:
            if rival.arm.baseline == baseline:
                more = f"is as good (the method differs from it by {rival.difference})"
                return Verdict("prune nothing", f"; full training shortened to the same {words} {more}")
    if not to_full.above(-margin):
        return Verdict("undecided", f": {num_seeds} seeds do not show whether that is within the margin of {margin:g}")
    if as_good:
        # As good as the method, which is as good as full: that allows twice the margin, so compare it with full too.
        safe = [rival for rival in as_good if rival.to_full.above(-margin)]
        first = (safe or as_good)[0]
        more = f"; {first.arm.name} is as good (the method differs from it by {first.difference})"
        if not safe:
            return Verdict("undecided", f"{more}, but not shown to keep full training's ({first.to_full})")
        return Verdict("no scores needed", f"{more}: the scores are worth less than the margin here")
    for rival in rivals:
        if not rival.difference.above(0.0):
            more = f"it is not shown to be better than {rival.arm.name} (difference {rival.difference})"
            return Verdict("undecided", f"; {more}")
    if not rivals:
        more = "no baseline of the same cost ran (compare.baselines, or it saves less than an epoch)"
        return Verdict("undecided", f"; {more}")
    if not gains:
        return Verdict("undecided", f"; {num_seeds} seeds do not show that it is faster")
    more = f"better than every baseline of the same cost ({rivals[0].arm.name}: {rivals[0].difference})"
    return Verdict("worth it", f", within the margin of {margin:g}, and {more}")


def overall(verdicts: Sequence[Verdict], seeds: Sequence[int]) -> Verdict:
    """Return the verdict on all methods together.

    Args:
        verdicts: on at least one method, in the order of the seconds saved, the most first.
        seeds: of the runs.
    """

    def first(outcome: Outcome, words: str = "") -> Verdict | None:
        return next((v for v in verdicts if v.outcome == outcome and words in v.sentence), None)

    if verdict := first("worth it"):
        return Verdict(verdict.outcome, f"Prune here: {verdict.sentence}.")
    if verdict := first("no scores needed"):
        return Verdict(verdict.outcome, f"Samples can be left out here without scores: {verdict.sentence}.")
    if verdict := first("undecided"):
        counted = list(seeds) == list(range(len(seeds)))
        more = f"compare.seeds={2 * len(seeds)} continues" if counted else "more seeds in compare.seeds continue"
        cure = "" if len(seeds) == 1 else f"; {more} from these runs"
        return Verdict(verdict.outcome, f"Undecided, so prune nothing yet: {verdict.sentence}{cure}.")
    verdict = first("prune nothing", "shortened") or verdicts[0]
    return Verdict(verdict.outcome, f"Prune nothing here: {verdict.sentence}.")


def summary(arms: Sequence[ArmRuns], criteria: Criteria) -> dict[str, Any]:
    """Return the arms with their differences to full training, and the verdicts on the methods, as plain JSON types.

    Args:
        arms: the first one is full training.
        criteria: the decision criteria.

    Returns:
        Seeds, arms, verdicts. `timed_seeds` are those whose seconds count. `uneven_seconds` are the minimum and maximum
        seconds of an epoch on all samples in any arm, if they are far apart.
    """
    full = arms[0]
    seeds = [run.seed for run in full.runs]
    baselines = {
        arm.name: sorted(
            (other for other in arms if other.method_arm == arm.name and other is not arm),
            key=lambda other: -other.mean("accuracy"),
        )
        for arm in arms
        if arm.baseline == "method"
    }
    methods = {arm.name: arm for arm in arms if arm.name in baselines}
    verdicts = {name: judge(arm, full, baselines[name], criteria) for name, arm in methods.items()}
    by_saving = sorted(verdicts, key=lambda name: sum(methods[name].seconds))
    whole = [arm for arm in arms if arm.baseline in ("full", *SHORTENED)]
    epochs = [arm.runs[place].seconds / arm.runs[place].epochs for arm in whole for place in arm.timed]
    return {
        "uneven_seconds": [min(epochs), max(epochs)] if max(epochs) > _UNEVEN * min(epochs) else None,
        "seeds": seeds,
        "timed_seeds": [seeds[place] for place in full.timed],
        "margin": criteria.margin,
        "confidence": criteria.confidence,
        "arms": [_arm_row(arm, full, criteria) for arm in arms],
        "methods": {name: _method_row(arm, verdicts[name], baselines[name], criteria) for name, arm in methods.items()},
        "self_checks": [check for name in methods for check in _self_checks(baselines[name], criteria)],
        "verdict": dataclasses.asdict(overall([verdicts[name] for name in by_saving], seeds)),
    }


def _self_checks(baselines: Sequence[ArmRuns], criteria: Criteria) -> list[dict[str, Any]]:
    """Compare two baselines of a method that train alike and differ in the order of the samples only."""
    by_kind = {arm.baseline: arm for arm in baselines if not arm.same_as_full}
    if not {"random_epoch", "full_steps"} <= set(by_kind):
        return []
    one, other = by_kind["random_epoch"], by_kind["full_steps"]
    difference = criteria.difference(one, other)
    # A length is rounded up to whole epochs, which in short runs is more training.
    alike = abs(one.mean("samples_trained") / other.mean("samples_trained") - 1.0) < _ALIKE
    agrees = not (difference.above(0.0) or difference.below(0.0)) if alike and difference.low is not None else None
    return [{"arms": [one.name, other.name], "difference": dataclasses.asdict(difference), "agrees": agrees}]


def _arm_row(arm: ArmRuns, full: ArmRuns, criteria: Criteria) -> dict[str, Any]:
    several = len(arm.runs) > 1
    to_full = criteria.difference(arm, full)
    return {
        "name": arm.name,
        "baseline": arm.baseline,
        "method_arm": arm.method_arm,
        "matched": arm.runs[0].matched,
        "accuracy": arm.mean("accuracy"),
        "accuracy_sd": float(np.std(arm.column("accuracy"), ddof=1)) if several else None,
        "worst_class": arm.mean("worst_class"),
        "to_full": dataclasses.asdict(to_full),
        "non_inferior": (to_full.above(-criteria.margin) or same_runs(arm, full)) if several else None,
        "worst_class_to_full": dataclasses.asdict(criteria.difference(arm, full, "worst_class")),
        "epochs": sorted({run.epochs for run in arm.runs}),
        **{name: arm.mean(name) for name in _MEANS},
        "seconds": float(np.mean(arm.seconds)),
        **{f"{name}_saved": 1.0 - arm.mean(name) / full.mean(name) for name in ("samples_trained", "compute")},
        "seconds_to_full": dataclasses.asdict(paired_ratio(arm.seconds, full.seconds, criteria.confidence)),
        "runs": [dataclasses.asdict(run) for run in arm.runs],
    }


def _method_row(arm: ArmRuns, verdict: Verdict, baselines: Sequence[ArmRuns], criteria: Criteria) -> dict[str, Any]:
    """Return a method's verdict, and its difference to each of its baselines, the strongest first."""
    rivals = [other.name for other in baselines if other.baseline != "ratio_0"]
    return {
        **dataclasses.asdict(verdict),
        "strongest_baseline": rivals[0] if rivals else None,
        "to_baselines": {other.name: dataclasses.asdict(criteria.difference(arm, other)) for other in baselines},
    }
