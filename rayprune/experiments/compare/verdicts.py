"""The verdicts of a comparison: one table of rules, and the sentences that explain them.

`RULES` decides: the first rule whose condition holds gives the outcome. docs/comparing.md shows the same table. A
condition reads the intervals of `Evidence` only, never a difference that merely is not significant. A rule on some arm
of the method's cost reads intervals that are wider, so that the number of these arms does not raise the rate of wrong
verdicts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from rayprune.experiments.compare.looks import Criteria
from rayprune.experiments.compare.statistics import (
    LEAST_TIMED,
    ArmRuns,
    Difference,
    paired_difference,
    paired_ratio,
    same_runs,
)

Outcome = Literal["worth it", "train shorter", "baseline is as good", "undecided", "best at its cost", "prune nothing"]
# Full training in fewer epochs, at the cost of a method.
SHORTENED = {"full_time": "time", "full_steps": "samples trained"}
_LEAST_SAVED = 0.05  # a method that saves a smaller fraction of the seconds counts as not faster
_MEANS = ("samples_trained", "samples_forwarded", "compute", "flops", "learning_rate", "mean_step_scale")
_ALIKE = 0.03  # two amounts of training that differ by a smaller fraction should give the same accuracy
_UNEVEN = 1.25  # if equal work differs in time by this factor, something else ran on the machine
_MOST_SEEDS = 500


@dataclass(frozen=True)
class Rival:
    """An arm of the method's cost.

    Attributes:
        name, baseline: of the arm.
        difference: the method minus this arm.
        to_full: this arm minus full training.
        lead_beyond_loss: by how much the method's lead over this arm exceeds its loss against full training.
        criteria: for a claim that some rival has a property.
    """

    name: str
    baseline: str
    difference: Difference
    to_full: Difference
    lead_beyond_loss: Difference
    criteria: Criteria

    @property
    def as_good(self) -> bool:
        """Whether the method is shown to be better by less than `rival_margin`, if at all."""
        return self._wide(self.difference).below(self.criteria.rival_margin)

    @property
    def keeps(self) -> bool:
        """Whether this arm is shown to keep full training's accuracy within `margin`."""
        return self._wide(self.to_full).above(-self.criteria.margin)

    @property
    def lags(self) -> bool:
        """Whether the method's lead over this arm is shown to be smaller than its loss."""
        return self._wide(self.lead_beyond_loss).below(0.0)

    def _wide(self, difference: Difference) -> Difference:
        return difference.with_seeds(difference.num_seeds, self.criteria.interval_confidence)


@dataclass(frozen=True)
class Evidence:
    """What the runs show about a method.

    Attributes:
        to_full: the method minus full training.
        time: its seconds divided by full training's; None if fewer than three seeds were timed alone.
        rivals: the arms of its cost, the most accurate first.
        margin: loss of accuracy that counts as none.
    """

    to_full: Difference
    time: Difference | None
    rivals: Sequence[Rival]
    margin: float

    @property
    def lost(self) -> bool:
        """Whether it is shown to lose more than the margin."""
        return self.to_full.below(-self.margin)

    @property
    def kept(self) -> bool:
        """Whether it is shown to lose less than the margin, if anything."""
        return self.to_full.above(-self.margin)

    @property
    def better(self) -> bool:
        """Whether it is shown to be more accurate than full training."""
        return self.to_full.above(0.0)

    @property
    def faster(self) -> bool:
        """Whether it is shown to take less time than full training."""
        return self.time is not None and self.time.below(1.0)

    @property
    def no_faster(self) -> bool:
        """Whether it is shown to save less than 5% of the time."""
        return self.time is not None and self.time.above(1.0 - _LEAST_SAVED)

    @property
    def beats_all(self) -> bool:
        """Whether it is shown to be better than every arm of its cost; False if there is none."""
        return bool(self.rivals) and all(rival.difference.above(0.0) for rival in self.rivals)

    @property
    def ahead(self) -> bool:
        """Whether its lead over every arm of its cost is shown to exceed its loss; False if there is no such arm."""
        return bool(self.rivals) and all(rival.lead_beyond_loss.above(0.0) for rival in self.rivals)

    @property
    def behind(self) -> bool:
        """Whether its lead over some arm of its cost is shown to be smaller than its loss, or there is no such arm."""
        return not self.rivals or any(rival.lags for rival in self.rivals)

    @property
    def shorter(self) -> Rival | None:
        """The first shortened full training that is as good and keeps the accuracy."""
        return next((rival for rival in self._equal if rival.baseline in SHORTENED), None)

    @property
    def equal(self) -> Rival | None:
        """The first arm of its cost that is as good and keeps the accuracy."""
        return next(iter(self._equal), None)

    @property
    def _equal(self) -> list[Rival]:
        return [rival for rival in self.rivals if rival.as_good and rival.keeps]


@dataclass(frozen=True)
class Rule:
    """A row of the table: an outcome, when it holds, in words and as a condition, and why, in words."""

    outcome: Outcome
    when: str
    holds: Callable[[Evidence], bool]
    why: Callable[[Evidence], str]


# The first rule that holds gives the verdict.
RULES = (
    Rule(
        "undecided",
        "there is a single seed",
        lambda e: e.to_full.low is None,
        lambda e: "one seed gives no interval; set compare.seeds=3",
    ),
    Rule(
        "train shorter",
        "shortened full training is as good and keeps the accuracy",
        lambda e: e.shorter is not None,
        lambda e: _as_good(e.shorter),
    ),
    Rule(
        "baseline is as good",
        "another baseline is as good and keeps the accuracy",
        lambda e: e.equal is not None,
        lambda e: _as_good(e.equal),
    ),
    Rule(
        "prune nothing",
        "it saves less than 5% of the time and is not better than full training",
        lambda e: e.no_faster and not e.better,
        lambda e: "no better, and not faster",
    ),
    Rule(
        "best at its cost",
        "it loses more than the margin, but is faster, and its lead over every baseline is larger than its loss",
        lambda e: e.lost and e.faster and e.ahead,
        lambda e: f"a loss beyond the margin of {e.margin:g}, but every baseline of its cost loses over twice as much",
    ),
    Rule(
        "prune nothing",
        "it loses more than the margin, and its lead over some baseline is smaller than its loss",
        lambda e: e.lost and e.behind,
        lambda e: f"a loss beyond the margin of {e.margin:g}",
    ),
    Rule("undecided", "it is not shown to keep the accuracy", lambda e: not e.kept, lambda e: _whether_kept(e)),
    Rule(
        "worth it",
        "it keeps the accuracy, is better than every baseline, and is faster",
        lambda e: e.kept and e.beats_all and e.faster,
        lambda e: (
            f"within the margin of {e.margin:g}, and better than every baseline of the same cost "
            f"({e.rivals[0].name}: {e.rivals[0].difference})"
        ),
    ),
    Rule("undecided", "none of these holds", lambda e: True, lambda e: _what_is_open(e)),
)


def _as_good(rival: Rival | None) -> str:
    assert rival is not None
    name = rival.name
    if rival.baseline in SHORTENED:
        name = f"full training shortened to the same {SHORTENED[rival.baseline]}"
    return f"{name} is as good (the method differs from it by {rival.difference})"


def _whether_kept(evidence: Evidence) -> str:
    seeds, margin = evidence.to_full.num_seeds, evidence.margin
    if evidence.lost:
        return f"a loss beyond the margin of {margin:g}; {seeds} seeds do not show whether its baselines lose much more"
    return f"{seeds} seeds do not show whether that is within the margin of {margin:g}"


def _what_is_open(evidence: Evidence) -> str:
    if not evidence.rivals:
        return "no baseline of the same cost ran (compare.baselines, or it saves less than an epoch)"
    for rival in evidence.rivals:
        if rival.as_good:
            return f"{_as_good(rival)}, but not shown to keep full training's accuracy ({rival.to_full})"
    for rival in evidence.rivals:
        if not rival.difference.above(0.0):
            return f"it is not shown to be better than {rival.name} (difference {rival.difference})"
    if evidence.better and not evidence.faster and evidence.time is not None:
        return "better, and not shown to be faster: compare it with full training for more epochs"
    if evidence.time is None:
        return f"fewer than {LEAST_TIMED} seeds were timed alone, so the saving is not shown (compare.timed_seeds)"
    return f"{evidence.time.num_seeds} timed seeds do not show that it is faster"


@dataclass(frozen=True)
class Verdict:
    """The conclusion of a comparison, for one method or for all.

    Attributes:
        outcome: what to do.
        sentence: why, with the numbers.
        seeds_needed: for an undecided method, how many seeds would decide if means and variances stay as they are; None
            if no number does, or if it is decided.
    """

    outcome: Outcome
    sentence: str
    seeds_needed: int | None = None


def judge(
    method: ArmRuns, full: ArmRuns, baselines: Sequence[ArmRuns], criteria: Criteria, *, ask_for_seeds: bool = True
) -> Verdict:
    """Apply `RULES` to a method.

    Args:
        method: the arm of the method.
        full: training on all samples.
        baselines: the arms to compare with; `ratio_0`, and shortened training that was not shortened, are ignored.
        criteria: margins, confidence and look.
        ask_for_seeds: whether to search for the number of seeds that would decide.
    """
    evidence = _evidence(method, full, baselines, criteria)
    rule = _rule(evidence)
    needed = None
    if ask_for_seeds and rule.outcome == "undecided" and len(full.runs) > 1:
        needed = _seeds_needed(evidence, criteria, criteria.time_ratio(method, full))
    sentence = f"{method.name} differs from full by {evidence.to_full}, {_cost(method, full, evidence)}"
    return Verdict(rule.outcome, f"{sentence}; {rule.why(evidence)}", needed)


def _evidence(method: ArmRuns, full: ArmRuns, baselines: Sequence[ArmRuns], criteria: Criteria) -> Evidence:
    alone = all(arm.runs[place].alone for arm in (method, full) for place in method.timed)
    time = criteria.time_ratio(method, full) if alone and len(method.timed) >= LEAST_TIMED else None
    arms = [
        arm
        for arm in sorted(baselines, key=lambda arm: -arm.mean("accuracy"))
        if arm.baseline != "ratio_0" and not arm.same_as_full and not (arm.baseline == "full_time" and time is None)
    ]
    rivals = [
        Rival(
            arm.name,
            arm.baseline,
            criteria.difference(method, arm),
            criteria.difference(arm, full),
            criteria.lead_beyond_loss(method, arm, full),
            criteria.any_of(len(arms)),
        )
        for arm in arms
    ]
    return Evidence(criteria.difference(method, full), time, rivals, criteria.margin)


def _rule(evidence: Evidence) -> Rule:
    return next(rule for rule in RULES if rule.holds(evidence))


def _seeds_needed(evidence: Evidence, criteria: Criteria, ratio: Difference) -> int | None:
    """Return the smallest number of seeds whose look, the next one, would decide with the same means and variances.

    Args:
        evidence: of this look.
        criteria: of this look.
        ratio: of the seconds. If there were too few seeds to time it, it is assumed to stay.
    """
    next_look, num_seeds = dataclasses.replace(criteria, look=criteria.look + 1), evidence.to_full.num_seeds
    time = evidence.time
    if num_seeds < LEAST_TIMED and ratio.num_seeds == num_seeds:
        time = Difference(ratio.mean, ratio.mean, ratio.mean)
    for number in range(max(num_seeds + 1, LEAST_TIMED), _MOST_SEEDS + 1):
        scaled = partial(Difference.with_seeds, num_seeds=number, confidence=next_look.interval_confidence)
        rivals = [
            dataclasses.replace(
                rival,
                difference=scaled(rival.difference),
                to_full=scaled(rival.to_full),
                lead_beyond_loss=scaled(rival.lead_beyond_loss),
                criteria=next_look.any_of(len(evidence.rivals)),
            )
            for rival in evidence.rivals
        ]
        if _rule(Evidence(scaled(evidence.to_full), time, rivals, evidence.margin)).outcome != "undecided":
            return number
    return None


def _cost(method: ArmRuns, full: ArmRuns, evidence: Evidence) -> str:
    saved = 1.0 - (evidence.time or paired_ratio(method.seconds, full.seconds, 0.95)).mean
    cost = f"{saved:.0%} of the seconds saved" if saved > 0 else f"{-saved:.0%} more seconds"
    if evidence.time is None:
        timed = len(method.timed)
        doubt = " (timed once)" if timed == 1 else " (timed twice)" if timed < LEAST_TIMED else " (not timed alone)"
    else:
        doubt = "" if evidence.faster or evidence.time.above(1.0) else " (within the noise of the seeds)"
    return f"{cost}{doubt}{method.caveat}"


_BEST_FIRST: dict[Outcome, str] = {
    "worth it": "Prune here",
    "train shorter": "Train shorter instead",
    "baseline is as good": "A baseline is as good here",
    "undecided": "Undecided, so prune nothing yet",
    "best at its cost": "Prune only if full training is too expensive",
    "prune nothing": "Prune nothing here",
}


def overall(verdicts: Sequence[Verdict], criteria: Criteria, seeds: Sequence[int]) -> Verdict:
    """Return the verdict on all methods together: the first outcome that some method has, best news first.

    Args:
        verdicts: on at least one method, in the order of the seconds saved, the most first.
        criteria: for the look.
        seeds: of the runs.
    """
    best = min(verdicts, key=lambda verdict: list(_BEST_FIRST).index(verdict.outcome))
    more = ""
    if best.outcome == "undecided" and len(seeds) > 1:
        more = f"; {_more_seeds(best.seeds_needed, seeds)}"
    methods = f", {criteria.num_methods} methods" if criteria.num_methods > 1 else ""
    look = f"Look {criteria.look}{methods}: {100 * criteria.interval_confidence:.5g}% intervals."
    return dataclasses.replace(best, sentence=f"{_BEST_FIRST[best.outcome]}: {best.sentence}{more}. {look}")


def _more_seeds(needed: int | None, seeds: Sequence[int]) -> str:
    if needed is None:
        return "more seeds alone would not decide"
    counted = list(seeds) == list(range(len(seeds)))
    how = f"compare.seeds={needed} continues" if counted else "more seeds in compare.seeds continue"
    return f"if the means stay, {needed} seeds would decide; {how} from these runs"


def summary(arms: Sequence[ArmRuns], criteria: Criteria) -> dict[str, Any]:
    """Return the arms with their differences to full training, and the verdicts on the methods, as plain JSON types.

    Args:
        arms: the first one is full training.
        criteria: the decision criteria.

    Returns:
        Seeds, arms, verdicts. `confidence` is that of all intervals. `timed_seeds` are those whose seconds count.
        `uneven_seconds` are the minimum and maximum seconds of an epoch on all samples in any arm, if they are far
        apart.
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
        "rival_margin": criteria.rival_margin,
        "confidence": criteria.interval_confidence,
        "look": criteria.look,
        "arms": [_arm_row(arm, full, criteria) for arm in arms],
        "methods": {name: _method_row(arm, verdicts[name], baselines[name], criteria) for name, arm in methods.items()},
        "self_checks": [check for name in methods for check in _self_checks(baselines[name], criteria)],
        "verdict": dataclasses.asdict(overall([verdicts[name] for name in by_saving], criteria, seeds)),
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
    worst = (arm.column("worst_class"), full.column("worst_class"))
    return {
        "name": arm.name,
        "baseline": arm.baseline,
        "method_arm": arm.method_arm,
        "matched": arm.runs[0].matched,
        "accuracy": arm.mean("accuracy"),
        "accuracy_sd": float(np.std(arm.column("accuracy"), ddof=1)) if several else None,
        "worst_class": arm.mean("worst_class"),
        "to_full": dataclasses.asdict(to_full),
        "sample_share": to_full.sample_share,
        "non_inferior": (to_full.above(-criteria.margin) or same_runs(arm, full)) if several else None,
        "worst_class_to_full": dataclasses.asdict(paired_difference(*worst, criteria.interval_confidence)),
        "epochs": sorted({run.epochs for run in arm.runs}),
        **{name: arm.mean(name) for name in _MEANS},
        "seconds": float(np.mean(arm.seconds)),
        **{f"{name}_saved": 1.0 - arm.mean(name) / full.mean(name) for name in ("samples_trained", "compute")},
        "seconds_to_full": dataclasses.asdict(criteria.time_ratio(arm, full)),
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
