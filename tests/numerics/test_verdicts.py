"""Intervals against hand-computed ones and known truths, and the rules of the verdicts, one by one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.verdicts import TRUTHS, Truth, decided
from rayprune.config.experiments import BASELINES
from rayprune.experiments.compare.looks import Criteria, seeds_for_margin
from rayprune.experiments.compare.statistics import (
    ArmRuns,
    Difference,
    RunOutcome,
    crossed_difference,
    paired_difference,
    paired_ratio,
)
from rayprune.experiments.compare.verdicts import RULES, Evidence, Rival, Verdict, judge, overall

POINTS = st.floats(0, 100, allow_subnormal=False)
PAIRS = st.lists(st.tuples(POINTS, POINTS), min_size=2, max_size=12)
# Quantiles of Student's t as printed in tables: (confidence, degrees of freedom) → two-sided.
T_TABLE = {(0.95, 1): 12.706, (0.95, 2): 4.303, (0.95, 9): 2.262, (0.90, 2): 2.920}


@pytest.mark.parametrize(("confidence", "freedom"), T_TABLE)
def test_the_interval_is_that_of_the_t_table(confidence: float, freedom: int) -> None:
    differences = np.linspace(-1.0, 2.0, freedom + 1)
    found = paired_difference(80 + differences, [80.0] * differences.size, confidence)
    half = T_TABLE[confidence, freedom] * differences.std(ddof=1) / math.sqrt(differences.size)
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-3)


def test_pairs_are_kept_together() -> None:
    # Seeds differ by 20 points, the arms by 1 in each: unpaired statistics would drown the difference in the seeds'.
    found = paired_difference([71.0, 81.0, 91.1], [70.0, 80.0, 90.0], 0.95)
    assert found.above(0.8)
    assert found.below(1.3)


def test_three_seeds_by_hand() -> None:
    # differences 1, 0, 2: mean 1, sd 1, half width 4.3027 / √3
    found = paired_difference([91.0, 92.0, 93.0], [90.0, 92.0, 91.0], 0.95)
    assert (found.low, found.mean, found.high) == pytest.approx((-1.48414, 1.0, 3.48414), abs=1e-4)


def test_one_seed_has_no_interval_and_claims_nothing() -> None:
    for found in (paired_difference([99.0], [50.0], 0.95), crossed_difference(table([99]), table([50]), 0.95)):
        assert (found.mean, found.low, found.high) == (49.0, None, None)
        assert not found.above(-100)
        assert not found.below(100)


def test_a_slow_machine_slows_both_arms_of_a_seed() -> None:
    found = paired_ratio([2.16, 0.79, 0.84], [2.7, 1.0, 1.05], 0.95)
    assert found.mean == pytest.approx((0.8 * 0.79 * 0.8) ** (1 / 3))
    assert found.below(0.83)
    assert not paired_difference([2.16, 0.79, 0.84], [2.7, 1.0, 1.05], 0.95).below(0.0)
    assert math.isfinite(paired_ratio([1.0, 99.0], [99.0, 1.0], 0.9999).high or math.inf)


@given(PAIRS)
def test_turned_round_the_interval_is_mirrored(pairs: list[tuple[float, float]]) -> None:
    one, other = zip(*pairs, strict=True)
    there, back = paired_difference(one, other, 0.95), paired_difference(other, one, 0.95)
    assert there.low is not None
    assert back.high is not None
    assert there.low <= there.mean <= -back.mean + 1e-9
    assert there.low == pytest.approx(-back.high, abs=1e-9)


@given(PAIRS, st.floats(0.5, 0.9), POINTS)
def test_more_confidence_is_wider_and_a_shift_moves_it(
    pairs: list[tuple[float, float]], confidence: float, shift: float
) -> None:
    one, other = map(np.array, zip(*pairs, strict=True))
    narrow, wide = (paired_difference(one, other, c) for c in (confidence, confidence + 0.05))
    moved = paired_difference(one + shift, other, confidence)
    assert None not in (narrow.low, wide.low, moved.low)
    assert wide.low <= narrow.low  # type: ignore[operator]
    assert moved.low == pytest.approx(narrow.low + shift, abs=1e-6)  # type: ignore[operator]


def table(counts: list[int], size: int = 100) -> NDArray[np.bool_]:
    """Return (S, V) runs of which the first samples are correct."""
    return np.array([[place < count for place in range(size)] for count in counts])


def test_the_two_parts_of_the_variance_by_hand() -> None:
    # d = [[0, 1, 0, 0], [0, 0, 1, 1]]: seed means 1/4, 1/2; sample means 0, 1/2, 1/2, 1/2; mean 3/8.
    one = np.array([[True, True, False, True], [True, True, True, True]])
    other = np.array([[True, False, False, True], [True, True, False, False]])
    found = crossed_difference(one, other, 0.95)
    seeds, samples, total = 4 * 2 * 0.125**2, 2 * (0.375**2 + 3 * 0.125**2), 3 - 8 * 0.375**2
    rest = (total - seeds - samples) / 3
    assert found.mean == pytest.approx(37.5)
    assert found.seed_se == pytest.approx(100 * math.sqrt(max(seeds, 1 / 24) / 8))
    # Two samples more, on which all runs disagree, one in each direction.
    assert found.sample_se == pytest.approx(100 * math.sqrt((max(samples / 3 - rest, 0) + 2 * 2 / 4) / 8))
    half = math.hypot(12.7062 * found.seed_se, 1.95996 * found.sample_se)
    assert (found.low, found.high) == pytest.approx((37.5 - half, 37.5 + half), rel=1e-4)


def test_samples_that_all_seeds_agree_on_are_a_variance_that_seeds_do_not_reduce() -> None:
    # The second arm is wrong on ten more samples, the same ones with every seed.
    found = crossed_difference(table([90] * 20), table([80] * 20), 0.95)
    assert found.sample_share is not None
    assert found.sample_share > 0.98
    assert found.sample_se == pytest.approx(100 * math.sqrt(0.1 * 0.9 / 99 + 2 / 100**2), rel=1e-6)
    more = found.with_seeds(2000, 0.95)
    assert more.low == pytest.approx(10 - 1.96 * found.sample_se, rel=1e-2)


@pytest.mark.parametrize("num_seeds", [3, 12, 48])
def test_few_samples_that_differ_are_not_taken_for_certainty(num_seeds: int) -> None:
    # One arm fails on 1% of the samples, always the same ones; 360 samples hold 3.6 of them on average.
    rng, missed, repeats = np.random.default_rng(1), 0, 500
    right = np.ones((num_seeds, 360), bool)
    for _ in range(repeats):
        fails = np.broadcast_to(rng.random(360) < 0.01, right.shape) ^ (rng.random(right.shape) < 0.002)
        missed += crossed_difference(right & ~fails, right, 0.95).above(-1.2)
    assert missed / repeats <= 0.05


@pytest.mark.parametrize("num_seeds", [3, 12])
def test_the_interval_covers_the_truth_where_that_of_the_seeds_alone_does_not(num_seeds: int) -> None:
    # Effects of seeds (sd 0.3 points), samples (sd 20 points), and the rest; the truth is −1 point.
    rng, size, missed = np.random.default_rng(0), 400, np.zeros(2)
    for _ in range(400):
        own_V = rng.normal(-0.01, 0.2, size)
        chance_SV = np.clip(np.abs(own_V + rng.normal(0, 0.003, (num_seeds, 1))), 0, 1)
        flips_SV = rng.random((num_seeds, size)) < chance_SV
        one_SV, other_SV = flips_SV & (own_V > 0), flips_SV & (own_V <= 0)
        truth = -100 * 0.01
        crossed = crossed_difference(one_SV, other_SV, 0.95)
        paired = paired_difference(100 * one_SV.mean(1), 100 * other_SV.mean(1), 0.95)
        missed += [found.above(truth) or found.below(truth) for found in (crossed, paired)]
    assert missed[0] / 400 < 0.08, "95% intervals, and three standard errors of a simulation with 400 repetitions"
    assert missed[1] > missed[0] + 10


def test_runs_that_happen_to_agree_are_no_certainty() -> None:
    all_right = np.ones((12, 10), bool)
    found = crossed_difference(all_right, all_right, 0.95)
    assert found.mean == 0.0
    assert found.high is not None
    assert found.high > 25.0, "ten samples cannot show that two arms agree"


def test_each_look_and_each_method_takes_its_part_of_the_false_rate() -> None:
    first = Criteria(1.0, 1.0, 0.95)
    assert first.interval_confidence == pytest.approx(0.95)
    levels = [dataclasses.replace(first, look=look).interval_confidence for look in range(1, 20)]
    assert sum((1 - level) / 2 for level in levels) <= 0.05, "one-sided claims at every look"
    assert dataclasses.replace(first, look=3, num_methods=5).interval_confidence == pytest.approx(1 - 0.05 / 20)


def test_the_number_of_seeds_that_a_margin_needs_by_hand() -> None:
    # The sample size of a one-sample t-test with 80% power at one standard deviation, α = .05 two-sided.
    assert seeds_for_margin(1.0, 1.0, 0.0, 0.95) == 10
    assert seeds_for_margin(0.01, 1.0, 0.0, 0.95) is None
    narrow, wide = (seeds_for_margin(margin, 1.0, 0.0, 0.95) for margin in (0.5, 2.0))
    assert narrow is not None
    assert wide is not None
    assert narrow > 30 > wide
    # More seeds do not help against the choice of validation samples: (1.96 + 0.84) · 0.36 > 1.
    assert seeds_for_margin(1.0, 0.1, 0.35, 0.95) is not None
    assert seeds_for_margin(1.0, 0.1, 0.36, 0.95) is None


def difference(mean: float, half: float = 0.1, num_seeds: int = 3) -> Difference:
    return Difference(mean, mean - half, mean + half, half / 4.303, 0.0, num_seeds)


CRITERIA = Criteria(1.0, 0.5, 0.95)


def rival(baseline: str, behind: float, half: float = 0.1, to_full: float | None = None) -> Rival:
    """Return an arm that is `behind` points behind the method and `to_full` points above full training."""
    whole = -behind if to_full is None else to_full
    own = difference(behind, half)
    lead = difference(behind + min(0.0, behind + whole), half)
    return Rival(baseline, baseline, own, difference(whole, half), lead, CRITERIA)


def evidence(**changes: Any) -> Evidence:
    """Return what speaks for a method that is worth it, with changes."""
    rivals = (rival("random_epoch", 2.0), rival("full_steps", 3.0))
    return dataclasses.replace(Evidence(difference(0.0), difference(0.7), rivals, 1.0), **changes)


# A method that loses 1.5 points, and baselines that lose more.
FAR_BELOW = (rival("random_epoch", 2.0, to_full=-3.5), rival("full_steps", 3.0, to_full=-4.5))
BELOW = (rival("random_epoch", 0.5, to_full=-2.0), rival("full_steps", 3.0, to_full=-4.5))
ROWS = [
    evidence(to_full=Difference(0.0, None, None)),
    evidence(rivals=(rival("random_epoch", 2.0), rival("full_time", 0.0))),
    evidence(rivals=(rival("shuffled", 0.1), rival("full_steps", 2.0))),
    evidence(time=difference(1.0, 0.01)),
    evidence(to_full=difference(-1.5), rivals=FAR_BELOW),
    evidence(to_full=difference(-1.5), rivals=BELOW),
    evidence(to_full=difference(-0.5, 0.6)),
    evidence(),
    evidence(rivals=(rival("random_epoch", 0.6, 0.7), rival("full_steps", 2.0))),
]


def test_every_rule_has_a_row() -> None:
    assert len(ROWS) == len(RULES)


@pytest.mark.parametrize("number", range(len(RULES)), ids=[f"{rule.outcome}: {rule.when}" for rule in RULES])
def test_a_row_of_the_table(number: int) -> None:
    row = ROWS[number]
    assert [rule.holds(row) for rule in RULES].index(True) == number
    assert "\n" not in RULES[number].why(row)


def test_the_docs_show_the_same_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "comparing.md").read_text()
    rows = [f"| {number} | {rule.when} | {rule.outcome} |" for number, rule in enumerate(RULES, start=1)]
    assert "\n".join(rows) in page


@pytest.mark.parametrize(
    ("found", "outcome", "words"),
    [
        (evidence(rivals=()), "undecided", "no baseline of the same cost ran"),
        (evidence(time=None), "undecided", "fewer than 3 seeds were timed alone"),
        (evidence(time=difference(0.8, 0.3)), "undecided", "3 timed seeds do not show that it is faster"),
        (evidence(to_full=difference(3.0), time=difference(1.2)), "undecided", "full training for more epochs"),
        (evidence(rivals=FAR_BELOW, to_full=difference(-1.5), time=None), "undecided", "lose much more"),
        (
            evidence(rivals=(rival("random", 0.0, to_full=-0.95),)),
            "undecided",
            "not shown to keep full training's accuracy",
        ),
        # A loss that every baseline exceeds is no reason to prune nothing.
        (evidence(to_full=difference(-0.29), rivals=(rival("full_steps", 0.91, to_full=-1.2),)), "worth it", ""),
        (evidence(to_full=difference(-0.29), rivals=(rival("full_steps", 0.91, 1.0, -1.2),)), "undecided", ""),
        # Shorter training that keeps the accuracy is better advice than to prune nothing.
        (evidence(to_full=difference(-2), rivals=(rival("full_steps", -2, to_full=0),)), "train shorter", ""),
        # A method that saves no time is not the best at its cost: that is full training.
        (evidence(to_full=difference(-1.5), rivals=FAR_BELOW, time=difference(0.98, 0.01)), "prune nothing", ""),
    ],
)
def test_what_is_open_is_named(found: Evidence, outcome: str, words: str) -> None:
    rule = next(rule for rule in RULES if rule.holds(found))
    assert (rule.outcome, words in rule.why(found)) == (outcome, True), rule.why(found)


@given(
    st.floats(-5, 5),
    st.floats(0.01, 3),
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 3)), min_size=1, max_size=4),
)
def test_a_method_ahead_of_all_its_baselines_is_never_told_to_prune_nothing(
    loss: float, half: float, leads: list[tuple[float, float]]
) -> None:
    rivals = tuple(rival("full_steps", lead, own, -loss - lead) for lead, own in leads)
    found = evidence(to_full=difference(-loss, half), rivals=rivals)
    outcome = next(rule for rule in RULES if rule.holds(found)).outcome
    if min(lead for lead, _ in leads) > max(0.0, loss):
        assert outcome != "prune nothing"
    if outcome == "worth it":
        assert half - 1.0 < -loss
        assert all(lead > own for lead, own in leads)


def test_one_of_many_rivals_needs_more_evidence() -> None:
    alone = rival("full_steps", 0.3, 0.19)
    one_of_seven = dataclasses.replace(alone, criteria=CRITERIA.any_of(7))
    assert (alone.as_good, one_of_seven.as_good) == (True, False)
    assert CRITERIA.any_of(7).interval_confidence == pytest.approx(1 - 0.05 / 7)


@pytest.mark.parametrize("truth", [truth for truth in TRUTHS if truth.goal], ids=lambda truth: truth.name)
def test_simulated_comparisons_are_rarely_wrong(truth: Truth) -> None:
    # `python -m benchmarks verdicts` does the same with more comparisons, and with 3 and 6 methods.
    shares = decided(truth, 1, 300 if truth.sparse else 150)
    assert shares == sorted(shares)
    assert shares[-1] <= 5.0, "the true shares are at most 3.3%"


def test_simulated_comparisons_find_what_is_true() -> None:
    power = decided(next(truth for truth in TRUTHS if truth.name == "loses 0, its baselines 4"), 1, 100)
    assert power[0] < power[2] < power[4]
    assert power[4] > 70.0


NUM_SAMPLES = 100_000


def runs_of(name: str, accuracy: list[float], seconds: list[float], same_as_full: bool = False) -> ArmRuns:
    """Return an arm with these accuracies, and the seconds of its first runs; a name of no baseline is a method's."""
    baseline = name if name in BASELINES else "method"
    folder = "full" if same_as_full else name
    padded = [*seconds, *([math.nan] * (len(accuracy) - len(seconds)))]
    runs = [
        RunOutcome(seed, f"{folder}-seed{seed}", 1, "", points, points, 1, 0, 1.0, 1.0, each, 0.1, 1.0)
        for seed, (points, each) in enumerate(zip(accuracy, padded, strict=True))
    ]
    counts = np.round(np.array(accuracy) / 100 * NUM_SAMPLES)
    correct_SV = np.arange(NUM_SAMPLES) < counts[:, None]
    return ArmRuns(name, baseline, name, runs, correct_SV, range(len(seconds)))


def arm(name: str, offset: float, seconds: float = 50.0, noise: float = 0.05, jitter: float = 0.0) -> ArmRuns:
    """Return an arm of three seeds about 90 points; the arm's own noise is small beside that of the seeds."""
    own = np.random.default_rng(len(name)).permutation([-noise, 0.0, noise])
    accuracy = np.array([88.0, 90.0, 92.0]) + offset + own
    return runs_of(name, accuracy.tolist(), [seconds - jitter, seconds, seconds + jitter])


FULL = arm("full", 0.0, 100.0)
WORSE = [arm("full_time", -2.0), arm("random", -3.0), arm("shuffled", -2.5)]


@pytest.mark.parametrize(
    ("method", "baselines", "outcome", "words"),
    [
        (arm("m", 0.1), WORSE, "worth it", "50% of the seconds saved; within the margin of 0.4"),
        (arm("m", -2.6), WORSE, "prune nothing", "a loss beyond the margin"),
        (arm("m", 0.0, 110.0), WORSE, "prune nothing", "10% more seconds; no better, and not faster"),
        (arm("m", 0.0), [arm("full_time", 0.0), *WORSE[1:]], "train shorter", "shortened to the same time is as good"),
        (arm("m", 0.0), [*WORSE[:2], arm("shuffled", 0.0)], "baseline is as good", "shuffled is as good"),
        (arm("m", 0.0), [*WORSE, arm("ratio_0", 1.0)], "worth it", "better than every baseline"),
        (arm("m", 0.0, jitter=40.0), WORSE, "undecided", "within the noise of the seeds"),
    ],
)
def test_runs_lead_to_verdicts(method: ArmRuns, baselines: list[ArmRuns], outcome: str, words: str) -> None:
    found = judge(method, FULL, baselines, Criteria(0.4, 0.4, 0.95))
    assert found.outcome == outcome, found.sentence
    assert words in found.sentence
    assert "\n" not in found.sentence


def test_a_wider_margin_never_turns_a_kept_accuracy_into_a_loss() -> None:
    verdicts = {
        margin: judge(arm("m", -1.3), FULL, WORSE, Criteria(margin, 0.2, 0.95)) for margin in (0.2, 0.7, 1.7, 2.5)
    }
    assert [found.outcome for found in verdicts.values()] == ["prune nothing", "prune nothing", "worth it", "worth it"]
    assert ["beyond" in found.sentence for found in verdicts.values()] == [True, True, False, False]


def test_the_margin_for_a_rival_is_another_one() -> None:
    baselines = [*WORSE[:2], arm("shuffled", -0.3)]
    assert judge(arm("m", 0.0), FULL, baselines, Criteria(1.0, 0.9, 0.95)).outcome == "baseline is as good"
    assert judge(arm("m", 0.0), FULL, baselines, Criteria(1.0, 0.1, 0.95)).outcome == "worth it"


@pytest.mark.parametrize("timed", [[7.0], [7.0, 7.1], []])
def test_fewer_than_three_timed_seeds_decide_nothing(timed: list[float]) -> None:
    method = runs_of("mine", [90.0, 91.0, 92.01], timed or [7.0, 7.0, 7.1])
    full = runs_of("full", [90.0, 91.0, 92.0], [10.0] * max(1, len(timed)) if timed else [10.0] * 3)
    if not timed:  # three seeds, but beside other runs
        full = dataclasses.replace(full, runs=[dataclasses.replace(run, alone=False) for run in full.runs])
    found = judge(method, full, [runs_of("random", [80.0, 81.0, 82.0], timed or [7.0] * 3)], Criteria(0.2, 0.2, 0.95))
    assert found.outcome == "undecided"
    assert {0: "not timed alone", 1: "timed once", 2: "timed twice"}[len(timed)] in found.sentence
    assert found.seeds_needed is None


def test_an_undecided_method_is_told_how_many_seeds_would_decide() -> None:
    method = arm("m", 0.0, noise=0.3)
    found = judge(method, FULL, WORSE, Criteria(0.4, 0.4, 0.95))
    assert found.outcome == "undecided"
    assert found.seeds_needed is not None
    number = found.seeds_needed
    assert 3 < number < 30
    # With as many seeds of the same mean and spread, the next look decides, and with one less it does not.
    values = np.full(number, 90.0)
    deviation = Criteria(0.4, 0.4, 0.95).difference(method, FULL).seed_se * math.sqrt(3)

    def verdict(count: int) -> str:
        spread = np.linspace(-1, 1, count)
        own = values[:count] + spread / spread.std(ddof=1) * deviation
        seconds = [50.0] * count
        full = runs_of("full", values[:count].tolist(), [100.0] * count)
        worse = [runs_of("random", (values[:count] - 3).tolist(), seconds)]
        return judge(runs_of("m", own.tolist(), seconds), full, worse, Criteria(0.4, 0.4, 0.95, look=2)).outcome

    assert (verdict(number), verdict(number - 1)) == ("worth it", "undecided")


@pytest.mark.parametrize(
    ("outcomes", "expected", "start"),
    [
        (["prune nothing", "worth it"], "worth it", "Prune here: b"),
        (["undecided", "baseline is as good"], "baseline is as good", "A baseline is as good here: b"),
        (["baseline is as good", "train shorter"], "train shorter", "Train shorter instead: b"),
        (["best at its cost", "undecided"], "undecided", "Undecided, so prune nothing yet: b"),
        (["prune nothing", "best at its cost"], "best at its cost", "Prune only if full training is too expensive: b"),
        (["prune nothing", "prune nothing"], "prune nothing", "Prune nothing here: a"),
    ],
)
def test_the_overall_verdict_is_the_best_news(outcomes: list[str], expected: str, start: str) -> None:
    verdicts = [Verdict(outcome, f"{name} …") for name, outcome in zip("ab", outcomes, strict=True)]  # type: ignore[arg-type]
    found = overall(verdicts, Criteria(1.0, 1.0, 0.95, look=2, num_methods=2), range(6))
    assert found.outcome == expected
    assert found.sentence.startswith(start)
    assert found.sentence.endswith(". Look 2, 2 methods: 98.75% intervals.")


def test_more_seeds_are_asked_for_beside_those_that_ran() -> None:
    criteria = Criteria(1.0, 1.0, 0.95)
    some = [Verdict("undecided", "a …", 7)]
    assert (
        "7 seeds would decide; compare.seeds=7 continues from these runs" in overall(some, criteria, [0, 1, 2]).sentence
    )
    assert "more seeds in compare.seeds continue from" in overall(some, criteria, [1, 5]).sentence
    assert "more seeds alone would not decide" in overall([Verdict("undecided", "a …")], criteria, [0, 1]).sentence


def test_full_training_that_was_not_shortened_is_no_rival() -> None:
    full = runs_of("full", [90.0, 91.0, 92.0], [10.0, 10.0, 10.0])
    method = runs_of("mine", [90.1, 91.0, 91.9], [9.0, 9.0, 9.1])
    same = [runs_of("full_time", [90.0, 91.0, 92.0], [10.0, 10.0, 10.0], same_as_full=True)]
    found = judge(method, full, same, Criteria(1.0, 1.0, 0.95))
    assert found.outcome == "undecided"
    assert "shortened to the same" not in found.sentence
    shortened = [runs_of("full_time", [90.0, 91.0, 92.0], [9.0, 9.0, 9.1])]
    assert judge(method, full, shortened, Criteria(1.0, 1.0, 0.95)).outcome == "train shorter"
