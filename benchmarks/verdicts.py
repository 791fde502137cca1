"""How often `rayprune compare` is wrong or decides, over simulated comparisons with a known truth.

Each comparison has full training, its methods, and two baselines for each method. Correctness follows a probit model
with crossed effects: sample v is correct with seed s in arm a if

    √.75·sample[v] + √.02·own[a, v] + √.0004·seed[a, s] + √.2296·rest[a, s, v]

lies below the quantile of the arm's true accuracy, all terms being standard normal. Differences between arms then have
effects of seeds (0.35 points), of samples, and of neither. Comparisons are judged with 3, 6, 12, 24 and 48 seeds and
stop at the first decision. `decided by look k` sums all looks up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from benchmarks.harness import Figure
from rayprune.experiments.compare.statistics import ArmRuns, Criteria, RunOutcome
from rayprune.experiments.compare.verdicts import judge, overall

LOOKS = (3, 6, 12, 24, 48)
_COMPARISONS = 2000
NUM_SAMPLES, FULL_ACCURACY, MARGIN, TIME_SD = 1000, 90.0, 1.0, 0.05
_SHARES = (0.75, 0.02, 0.0004, 0.2296)  # of the latent variance


@dataclass(frozen=True)
class Truth:
    """A simulated truth.

    Attributes:
        name: in words.
        method, rivals: true accuracies minus full training's, in points.
        time: the methods' true ratio of seconds.
        outcome: the verdict to count.
        goal: on the share of comparisons with this verdict after all looks, in percent.
    """

    name: str
    method: float
    rivals: tuple[float, float]
    time: float
    outcome: str
    goal: str


TRUTHS = (
    Truth("loses the margin, rivals 4 worse", -MARGIN, (-5.0, -5.0), 0.7, "worth it", "≤ 5"),
    Truth("as accurate as random_epoch", 0.0, (-4.0, 0.0), 0.7, "worth it", "≤ 5"),
    Truth("takes as long as full", 0.0, (-4.0, -4.0), 1.0, "worth it", "≤ 5"),
    Truth("loses the margin, rivals lose it too", -MARGIN, (-MARGIN, -MARGIN), 0.7, "train shorter", "≤ 5"),
    Truth("loses .29, rivals 1.2", -0.29, (-1.2, -1.2), 0.7, "prune nothing", "≤ 5"),
    Truth("as accurate as full, rivals 4 worse", 0.0, (-4.0, -4.0), 0.7, "worth it", ""),
    Truth("as accurate as full, so is full_steps", 0.0, (0.0, -1.0), 0.7, "train shorter", ""),
    Truth("loses 4, rivals too", -4.0, (-4.0, -4.0), 0.7, "prune nothing", ""),
)


def figures() -> Iterator[Figure]:
    """Yield, for each truth and 1, 3 and 6 methods, the percentage of comparisons with a verdict, by look."""
    for truth in TRUTHS:
        for num_methods in (1, 3, 6):
            shares = decided(truth, num_methods, _COMPARISONS)
            for look in (1, 3, 5):
                name = f"% '{truth.outcome}' by {LOOKS[look - 1]} seeds, {num_methods} methods: {truth.name}"
                yield Figure(name, [shares[look - 1]], truth.goal)


def decided(truth: Truth, num_methods: int, num_comparisons: int) -> list[float]:
    """Return the percentage of simulated comparisons that have given the truth's verdict by each look."""
    rng = np.random.default_rng(num_methods)
    looks = np.array([_first_look(truth, num_methods, rng) for _ in range(num_comparisons)])
    return [100.0 * float(np.mean((looks > 0) & (looks <= look))) for look in range(1, len(LOOKS) + 1)]


def _first_look(truth: Truth, num_methods: int, rng: np.random.Generator) -> int:
    """Return the look at which a comparison that stops at its first decision gives the counted verdict, 0 if none."""
    draw = _drawer(rng)
    full = draw("full", "full", "", 0.0, 1.0)
    methods = [draw(f"m{number}", "method", f"m{number}", truth.method, truth.time) for number in range(num_methods)]
    rivals = {
        method.name: [
            draw(f"{baseline}.{method.name}", baseline, method.name, offset, truth.time)
            for baseline, offset in zip(("full_steps", "random_epoch"), truth.rivals, strict=True)
        ]
        for method in methods
    }
    for look, num_seeds in enumerate(LOOKS, start=1):
        criteria = Criteria(MARGIN, MARGIN, 0.95, look=look, num_methods=num_methods)
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
            return look if outcome == truth.outcome else 0
    return 0


def _drawer(rng: np.random.Generator) -> Callable[[str, str, str, float, float], ArmRuns]:
    """Return a function that draws an arm of a comparison; the arms share the samples' effects."""
    sample, own, seed, rest = np.sqrt(_SHARES, dtype=np.float32)
    samples_V = sample * rng.standard_normal(NUM_SAMPLES, np.float32)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32)

    def draw(name: str, baseline: str, method_arm: str, offset: float, time: float) -> ArmRuns:
        num_seeds = LOOKS[-1]
        latent_SV = samples_V + own * normal(1, NUM_SAMPLES) + seed * normal(num_seeds, 1)
        latent_SV += rest * normal(num_seeds, NUM_SAMPLES)
        correct_SV = latent_SV < norm.ppf((FULL_ACCURACY + offset) / 100.0)
        seconds = time * np.exp(rng.normal(0.0, TIME_SD, num_seeds))
        runs = [
            RunOutcome(number, f"{name}-seed{number}", 1, "", points, points, 1, 0, 1.0, 1.0, each, 0.1, 1.0)
            for number, (points, each) in enumerate(zip(100.0 * correct_SV.mean(1), seconds.tolist(), strict=True))
        ]
        return ArmRuns(name, baseline, method_arm, runs, correct_SV, range(num_seeds))

    return draw


def _first(arm: ArmRuns, num_seeds: int) -> ArmRuns:
    timed = range(min(3, num_seeds))
    return ArmRuns(arm.name, arm.baseline, arm.method_arm, arm.runs[:num_seeds], arm.correct_SV[:num_seeds], timed)
