"""How often `rayprune compare` is wrong or decides, over simulated comparisons with a known truth.

Each comparison has full training, its methods, and baselines for each method. Correctness follows a probit model with
crossed effects: sample v is correct with seed s in arm a if

    √.75·sample[v] + √.02·own[a, v] + √.0004·seed[a, s] + √.2296·rest[a, s, v]

lies below the quantile of the arm's true accuracy, all terms being standard normal. Differences between arms then have
effects of seeds (0.35 points), of samples, and of neither. In a sparse comparison, an arm instead fails with every seed
on a random share of the samples that is its true loss, and each run differs on 0.2% of the samples. Comparisons are
judged with 3, 6, 12, 24 and 48 seeds and stop at the first decision. A share at k seeds sums all looks up to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from benchmarks.harness import Figure
from rayprune.config.experiments import BASELINES
from rayprune.experiments.compare.looks import Criteria
from rayprune.experiments.compare.statistics import ArmRuns, RunOutcome
from rayprune.experiments.compare.verdicts import Outcome, judge, overall

LOOKS = (3, 6, 12, 24, 48)
_COMPARISONS = 1000
NUM_SAMPLES, FULL_ACCURACY, MARGIN, TIME_SD = 1000, 90.0, 1.0, 0.05
_SHARES = (0.75, 0.02, 0.0004, 0.2296)  # of the latent variance
_FLIPS = 0.002


@dataclass(frozen=True)
class Truth:
    """A simulated truth.

    Attributes:
        name: in words.
        method: the methods' true accuracy minus full training's, in points.
        rivals: baseline → true accuracy minus full training's, in points.
        outcomes: the verdicts to count.
        goal: on the share of comparisons with these verdicts after all looks, in percent.
        time: the methods' true ratio of seconds.
        sparse: whether arms differ on few samples, always the same ones.
        margin: loss against full training that counts as none, in points; against rivals it is 1.
    """

    name: str
    method: float
    rivals: Mapping[str, float]
    outcomes: tuple[Outcome, ...]
    goal: str
    time: float = 0.7
    sparse: bool = False
    margin: float = MARGIN


_WORTH: tuple[Outcome, ...] = ("worth it",)
_NOTHING: tuple[Outcome, ...] = ("prune nothing",)
_AS_GOOD: tuple[Outcome, ...] = ("train shorter", "baseline is as good")
_SEVEN = [name for name in BASELINES if name not in {"full", "ratio_0"}][:7]


def _two(steps: float, random: float) -> dict[str, float]:
    return {"full_steps": steps, "random_epoch": random}


TRUTHS = (
    Truth("loses 1, its baselines 5", -MARGIN, _two(-5, -5), _WORTH, "≤ 5"),
    Truth("loses 1, its baselines 5, sparse", -MARGIN, _two(-5, -5), _WORTH, "≤ 5", sparse=True),
    Truth("loses 0, so does a baseline", 0.0, _two(-4, 0), _WORTH, "≤ 5"),
    Truth("loses 0, takes as long as full", 0.0, _two(-4, -4), _WORTH, "≤ 5", time=1.0),
    Truth("loses 1, so do its baselines", -MARGIN, _two(-MARGIN, -MARGIN), _AS_GOOD, "≤ 5"),
    Truth("loses 0, seven baselines 1", 0.0, dict.fromkeys(_SEVEN, -MARGIN), _AS_GOOD, "≤ 5", margin=3.0),
    Truth("loses .29, its baselines 1.2", -0.29, _two(-1.2, -1.2), _NOTHING, "≤ 5"),
    Truth("loses 2, its baselines 4.2", -2.0, _two(-4.2, -4.2), _NOTHING, "≤ 5"),
    Truth("loses 0, its baselines 4", 0.0, _two(-4, -4), _WORTH, ""),
    Truth("loses 0, so does full_steps", 0.0, _two(0, -1), _AS_GOOD, ""),
    Truth("loses 4, so do its baselines", -4.0, _two(-4, -4), _NOTHING, ""),
)


def figures() -> Iterator[Figure]:
    """Yield, for each truth and 1, 3 and 6 methods, the percentage of comparisons with a verdict, by look."""
    for truth in TRUTHS:
        for num_methods in (1, 3, 6):
            shares = decided(truth, num_methods, _COMPARISONS)
            for look in (1, 3, 5):
                what = f"{' or '.join(truth.outcomes)}, {num_methods} methods, {LOOKS[look - 1]} seeds"
                yield Figure(f"{truth.name}: % {what}", [shares[look - 1]], truth.goal)


def decided(truth: Truth, num_methods: int, num_comparisons: int) -> list[float]:
    """Return the percentage of simulated comparisons that have given the truth's verdict by each look."""
    rng = np.random.default_rng(num_methods)
    looks = np.array([_first_look(truth, num_methods, rng) for _ in range(num_comparisons)])
    return [100.0 * float(np.mean((looks > 0) & (looks <= look))) for look in range(1, len(LOOKS) + 1)]


def _first_look(truth: Truth, num_methods: int, rng: np.random.Generator) -> int:
    """Return the look at which a comparison that stops at its first decision gives the counted verdict, 0 if none."""
    draw = _drawer(rng, truth.sparse)
    full = draw("full", "full", "", 0.0, 1.0)
    methods = [draw(f"m{number}", "method", f"m{number}", truth.method, truth.time) for number in range(num_methods)]
    rivals = {
        method.name: [
            draw(f"{baseline}.{method.name}", baseline, method.name, offset, truth.time)
            for baseline, offset in truth.rivals.items()
        ]
        for method in methods
    }
    for look, num_seeds in enumerate(LOOKS, start=1):
        criteria = Criteria(truth.margin, MARGIN, 0.95, look=look, num_methods=num_methods)
        verdicts = [
            judge(
                _first(method, num_seeds),
                _first(full, num_seeds),
                [_first(rival, num_seeds) for rival in rivals[method.name]],
                criteria,
                ask_for_seeds=False,
            )
            for method in methods
        ]
        outcome = overall(verdicts, criteria, range(num_seeds)).outcome
        if outcome != "undecided":
            return look if outcome in truth.outcomes else 0
    return 0


def _drawer(rng: np.random.Generator, sparse: bool) -> Callable[[str, str, str, float, float], ArmRuns]:
    """Return a function that draws an arm of a comparison; the arms share the samples' effects."""
    sample, own, seed, rest = np.sqrt(_SHARES, dtype=np.float32)
    num_seeds = LOOKS[-1]
    samples_V = sample * rng.standard_normal(NUM_SAMPLES, np.float32)
    easy_V = rng.random(NUM_SAMPLES) < FULL_ACCURACY / 100.0

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    def correct(offset: float) -> NDArray[np.bool_]:
        if sparse:
            fails_V = rng.random(NUM_SAMPLES) < -offset / FULL_ACCURACY
            return (easy_V & ~fails_V) ^ (rng.random((num_seeds, NUM_SAMPLES)) < _FLIPS)
        latent_SV = samples_V + own * normal(1, NUM_SAMPLES) + seed * normal(num_seeds, 1)
        latent_SV += rest * normal(num_seeds, NUM_SAMPLES)
        return np.asarray(latent_SV < norm.ppf((FULL_ACCURACY + offset) / 100.0))

    def draw(name: str, baseline: str, method_arm: str, offset: float, time: float) -> ArmRuns:
        correct_SV = correct(offset)
        seconds = time * np.exp(rng.normal(0.0, TIME_SD, num_seeds))
        runs = [
            RunOutcome(number, f"{name}-seed{number}", 1, "", points, points, 1, 0, 1.0, 1.0, each, 0.1, 1.0)
            for number, (points, each) in enumerate(zip(100.0 * correct_SV.mean(1), seconds.tolist(), strict=True))
        ]
        return ArmRuns(name, baseline, method_arm, runs, correct_SV, range(num_seeds))

    return draw


def _first(arm: ArmRuns, num_seeds: int) -> ArmRuns:
    return dataclasses.replace(arm, runs=arm.runs[:num_seeds], correct_SV=arm.correct_SV[:num_seeds], timed=range(3))
