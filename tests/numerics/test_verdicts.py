"""Paired intervals against hand-computed ones, and what verdicts follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.config.experiments import BASELINES
from rayprune.experiments.compare.statistics import (
    ArmRuns,
    Criteria,
    RunOutcome,
    Verdict,
    judge,
    overall,
    paired_difference,
    paired_ratio,
)

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
    assert found.low is not None
    assert found.high is not None
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-3)


def test_pairs_are_kept_together() -> None:
    # Seeds differ by 20 points, the arms by 1 in each: unpaired statistics would drown the difference in the seeds'.
    found = paired_difference([71.0, 81.0, 91.1], [70.0, 80.0, 90.0], 0.95)
    assert found.above(0.8)
    assert found.high is not None
    assert found.high < 1.3


def test_three_seeds_by_hand() -> None:
    # differences 1, 0, 2: mean 1, sd 1, half width 4.3027 / √3
    found = paired_difference([91.0, 92.0, 93.0], [90.0, 92.0, 91.0], 0.95)
    assert (found.low, found.mean, found.high) == pytest.approx((-1.48414, 1.0, 3.48414), abs=1e-4)


def test_one_seed_has_no_interval_and_claims_nothing() -> None:
    found = paired_difference([99.0], [50.0], 0.95)
    assert (found.mean, found.low, found.high) == (49.0, None, None)
    assert not found.above(-100)
    assert not found.below(100)


def test_a_slow_machine_slows_both_arms_of_a_seed() -> None:
    found = paired_ratio([2.16, 0.79, 0.84], [2.7, 1.0, 1.05], 0.95)
    assert found.mean == pytest.approx((0.8 * 0.79 * 0.8) ** (1 / 3))
    assert found.below(0.83)
    assert not paired_difference([2.16, 0.79, 0.84], [2.7, 1.0, 1.05], 0.95).below(0.0)


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


def runs_of(name: str, accuracy: list[float], seconds: list[float], same_as_full: bool = False) -> ArmRuns:
    """Return an arm with these accuracies, and the seconds of its first runs; a name of no baseline is a method's."""
    baseline = name if name in BASELINES else "method"
    folder = "full" if same_as_full else name
    padded = [*seconds, *([math.nan] * (len(accuracy) - len(seconds)))]
    runs = [
        RunOutcome(seed, f"{folder}-seed{seed}", 1, "", points, points, 1, 0, 1.0, 1.0, each, 0.1, 1.0)
        for seed, (points, each) in enumerate(zip(accuracy, padded, strict=True))
    ]
    return ArmRuns(name, baseline, name, runs, range(len(seconds)))


def arm(name: str, offset: float, seconds: float = 50.0, noise: float = 0.05, jitter: float = 0.0) -> ArmRuns:
    """Return an arm of three seeds about 90 points; the arm's own noise is small beside that of the seeds."""
    own = np.random.default_rng(len(name)).permutation([-noise, 0.0, noise])
    accuracy = np.array([88.0, 90.0, 92.0]) + offset + own
    return runs_of(name, accuracy.tolist(), [seconds - jitter, seconds, seconds + jitter])


FULL = arm("full", 0.0, 100.0)
WORSE = [arm("full_time", -2.0), arm("random", -3.0), arm("shuffled", -2.5)]


def verdict(method: ArmRuns, baselines: list[ArmRuns], margin: float = 0.3) -> Verdict:
    return judge(method, FULL, baselines, Criteria(margin, 0.95))


@pytest.mark.parametrize(
    ("method", "baselines", "outcome", "words"),
    [
        (arm("m", 0.1), WORSE, "worth it", "50% of the seconds saved, within the margin of 0.3"),
        (arm("m", -2.0), WORSE, "prune nothing", "a loss beyond the margin"),
        (arm("m", 0.0, 110.0), WORSE, "prune nothing", "10% more seconds: no better, and not faster"),
        (arm("m", 0.0), [arm("full_time", 0.0), *WORSE[1:]], "prune nothing", "shortened to the same time is as good"),
        (
            arm("m", 0.0),
            [arm("full_steps", 0.0), *WORSE],
            "prune nothing",
            "shortened to the same samples trained is as good",
        ),
        (arm("m", 0.0), [*WORSE[:2], arm("shuffled", 0.0)], "no scores needed", "shuffled is as good"),
        (arm("m", 0.0), [*WORSE, arm("random_epoch", -0.2, noise=0.6)], "undecided", "better than random_epoch"),
        (arm("m", 0.0, noise=0.5), WORSE, "undecided", "3 seeds do not show"),
        (arm("m", 0.0), [], "undecided", "no baseline of the same cost ran"),
        (arm("m", 0.0), [*WORSE, arm("ratio_0", 1.0)], "worth it", "better than every baseline"),
        (arm("m", 3.0, 110.0), WORSE, "undecided", "10% more seconds: better, and more expensive than every baseline"),
        (arm("m", 0.0, 99.0), WORSE, "prune nothing", "1% of the seconds saved: no better, and not faster"),
        (arm("m", 0.0, 110.0, jitter=40.0), WORSE, "undecided", "5% more seconds (within the noise of the seeds)"),
        (arm("m", 0.0, jitter=40.0), WORSE, "undecided", "within the noise of the seeds"),
    ],
)
def test_a_verdict_for_every_case(method: ArmRuns, baselines: list[ArmRuns], outcome: str, words: str) -> None:
    found = verdict(method, baselines)
    assert found.outcome == outcome, found.sentence
    assert words in found.sentence
    assert "\n" not in found.sentence


def test_a_wider_margin_never_turns_a_kept_accuracy_into_a_loss() -> None:
    method = arm("m", -1.0)
    outcomes = [verdict(method, WORSE, margin).outcome for margin in (0.2, 0.9, 1.3, 2.0)]
    assert outcomes[0] == "prune nothing"
    assert "beyond" not in verdict(method, WORSE, 2.0).sentence


def test_one_seed_is_undecided() -> None:
    method, full = runs_of("m", [95.0], [1.0]), runs_of("full", [80.0], [2.0])
    found = judge(method, full, [], Criteria(0.2, 0.95))
    assert found.outcome == "undecided"
    assert "no interval" in found.sentence


@pytest.mark.parametrize(
    ("outcomes", "expected", "start"),
    [
        (["prune nothing", "worth it"], "worth it", "Prune here: b"),
        (["undecided", "no scores needed"], "no scores needed", "Samples can be left out here without scores: b"),
        (["prune nothing", "undecided"], "undecided", "Undecided, so prune nothing yet: b"),
        (["prune nothing", "prune nothing"], "prune nothing", "Prune nothing here: a"),
    ],
)
def test_the_overall_verdict_is_the_best_news(outcomes: list[str], expected: str, start: str) -> None:
    verdicts = [Verdict(outcome, f"{name} …") for name, outcome in zip("ab", outcomes, strict=True)]  # type: ignore[arg-type]
    found = overall(verdicts, range(3))
    assert found.outcome == expected
    assert found.sentence.startswith(start)


def test_more_seeds_are_asked_for_beside_those_that_ran() -> None:
    verdicts = [Verdict("undecided", "a …")]
    assert "compare.seeds=6 continues from these runs" in overall(verdicts, [0, 1, 2]).sentence
    assert "more seeds in compare.seeds continue from" in overall(verdicts, [1, 5]).sentence


def test_a_control_that_may_lose_too_much_is_not_recommended() -> None:
    # The method is within 1 of full, random within 1 of the method: random may still be 2 below full.
    full = runs_of("full", [90.0, 91.0, 92.0], [10.0, 10.0, 10.0])
    method = runs_of("mine", [89.4, 90.4, 91.41], [7.0, 7.0, 7.1])
    random = runs_of("random", [88.8, 89.8, 90.83], [7.0, 7.0, 7.1])
    found = judge(method, full, [random], Criteria(1.0, 0.95))
    assert found.outcome == "undecided"
    assert "random is as good" in found.sentence
    assert "not shown to keep" in found.sentence
    assert judge(method, full, [random], Criteria(1.5, 0.95)).outcome == "no scores needed"


def test_shortened_training_is_named_first_where_nothing_is_pruned() -> None:
    verdicts = [
        Verdict("prune nothing", "a loses"),
        Verdict("prune nothing", "full training shortened is as good"),
    ]
    assert overall(verdicts, range(3)).sentence == "Prune nothing here: full training shortened is as good."


def test_full_training_that_was_not_shortened_is_no_rival() -> None:
    full = runs_of("full", [90.0, 91.0, 92.0], [10.0, 10.0, 10.0])
    method = runs_of("mine", [90.1, 91.0, 91.9], [9.0, 9.0, 9.1])
    same = [runs_of("full_time", [90.0, 91.0, 92.0], [10.0, 10.0, 10.0], same_as_full=True)]
    verdict = judge(method, full, same, Criteria(1.0, 0.95))
    assert verdict.outcome == "undecided"
    assert "shortened to the same" not in verdict.sentence
    shortened = [runs_of("full_time", [90.0, 91.0, 92.0], [9.0, 9.0, 9.1])]
    assert judge(method, full, shortened, Criteria(1.0, 0.95)).outcome == "prune nothing"


def test_seeds_that_happen_to_agree_are_no_certainty() -> None:
    full = runs_of("full", [90.0, 91.0], [10.0, 10.0])
    method = runs_of("mine", [90.0, 91.0], [7.0, 7.0])
    rival = [runs_of("random", [89.72, 90.72], [7.0, 7.0])]
    assert judge(method, full, rival, Criteria(0.2, 0.95)).outcome == "worth it"
    assert judge(method, full, rival, Criteria(0.2, 0.95, resolution=0.28)).outcome == "undecided"


@pytest.mark.parametrize(
    ("seconds", "outcome", "words"),
    [
        (7.0, "worth it", "30% of the seconds saved (timed once), within the margin"),
        (9.7, "prune nothing", "3% of the seconds saved (timed once): no better, and not faster"),
        (12.0, "prune nothing", "20% more seconds (timed once): no better"),
    ],
)
def test_one_timing_decides_by_its_size(seconds: float, outcome: str, words: str) -> None:
    full = runs_of("full", [90.0, 91.0, 92.0], [10.0])
    method = runs_of("mine", [90.0, 91.0, 92.01], [seconds])
    found = judge(method, full, [runs_of("random", [80.0, 81.0, 82.0], [7.0])], Criteria(0.2, 0.95))
    assert (found.outcome, words in found.sentence) == (outcome, True), found.sentence


def test_a_better_and_more_expensive_method_is_not_called_worth_it() -> None:
    full = runs_of("full", [90.0, 91.0, 92.0], [10.0, 10.0, 10.0])
    method = runs_of("mine", [93.0, 94.0, 95.1], [20.0, 20.0, 20.2])
    verdict = judge(method, full, [runs_of("random", [80.0, 81.0, 82.0], [10.0, 10.0, 10.0])], Criteria(0.2, 0.95))
    assert verdict.outcome == "undecided"
    assert "more expensive" in verdict.sentence
