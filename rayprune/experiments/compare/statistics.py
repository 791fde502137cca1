"""The runs of a comparison, and the intervals of the differences between its arms.

All arms have the same S seeds and the same V validation samples, so they are compared pair by pair. Let d[s, v] be 1
if, with seed s, only the first arm classifies sample v correctly, −1 if only the second one does, and 0 otherwise.
Seeds and samples are crossed random effects,

    d[s, v] = mean + seed[s] + sample[v] + rest[s, v],

so the mean of d has the variance seed²/S + sample²/V + rest²/(SV). The mean squares of the two-way table estimate these
parts. More seeds reduce the first and the third part only. The interval adds the squares of two half-widths: Student's
t over the seeds, which is the interval of the paired t-test, and the normal distribution over the samples (Zou and
Donner, "Construction of confidence limits about effect measures", Statistics in Medicine 27, 2008).

Accuracies are in points, 0 to 100. Shapes: S seeds, V validation samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

LEAST_TIMED = 3  # seeds; fewer have no interval that could decide
_ROUNDING_VARIANCE = 1.0 / 6.0  # of the difference of two rounded numbers
_LARGEST_LOG = 700.0  # exp of more is no float64


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


@dataclass(frozen=True, eq=False)
class ArmRuns:
    """An arm's runs, one per seed, in the same order of seeds for all arms.

    Attributes:
        name: of the arm.
        baseline: name of the baseline; "method" for a method.
        method_arm: name of the method's arm: this one, or the one that it is compared with.
        runs: S outcomes.
        correct_SV: bool, whether a run classifies a validation sample correctly after its last epoch.
        timed: positions of the seeds whose seconds count.
        caveat: what its seconds leave out, in words.
    """

    name: str
    baseline: str
    method_arm: str
    runs: Sequence[RunOutcome]
    correct_SV: NDArray[np.bool_]
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


def same_runs(one: ArmRuns, other: ArmRuns) -> bool:
    """Return whether two arms have the same runs, as matched arms can."""
    return [run.folder for run in one.runs] == [run.folder for run in other.runs]


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
        seed_se: the standard error that more seeds reduce.
        sample_se: the standard error that is due to the choice of validation samples; more seeds do not reduce it.
        num_seeds: S.
    """

    mean: float
    low: float | None
    high: float | None
    seed_se: float = 0.0
    sample_se: float = 0.0
    num_seeds: int = 1

    @classmethod
    def of(cls, mean: float, seed_se: float, sample_se: float, num_seeds: int, confidence: float) -> Difference:
        """Return a difference with its interval; without one if there is a single seed."""
        if num_seeds == 1:
            return cls(mean, None, None)
        tail = (1.0 + confidence) / 2.0
        half = math.hypot(t_quantile(tail, num_seeds - 1) * seed_se, t_quantile(tail, None) * sample_se)
        return cls(mean, mean - half, mean + half, seed_se, sample_se, num_seeds)

    @property
    def sample_share(self) -> float | None:
        """The share of the variance that more seeds do not reduce; None without a variance."""
        variance = self.seed_se**2 + self.sample_se**2
        return self.sample_se**2 / variance if variance > 0 else None

    def with_seeds(self, num_seeds: int, confidence: float) -> Difference:
        """Return the difference that so many seeds would give if mean and variances stay as they are."""
        if self.low is None:
            return self
        seed_se = self.seed_se * math.sqrt(self.num_seeds / num_seeds)
        return Difference.of(self.mean, seed_se, self.sample_se, num_seeds, confidence)

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above a bound; never without an interval."""
        return self.low is not None and self.low > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below a bound; never without an interval."""
        return self.high is not None and self.high < bound

    def __str__(self) -> str:
        ends = "no interval" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"
        return f"{self.mean:+.2f} points ({ends})"


@cache
def t_quantile(probability: float, freedom: int | None) -> float:
    """Return a quantile of Student's t, of the normal distribution if `freedom` is None."""
    from scipy import stats

    return float(stats.norm.ppf(probability) if freedom is None else stats.t.ppf(probability, freedom))


def crossed_difference(one_SV: NDArray[np.bool_], other_SV: NDArray[np.bool_], confidence: float) -> Difference:
    """Return the difference of two arms' accuracies, with an interval over seeds and validation samples.

    Args:
        one_SV, other_SV: bool, whether each run classifies each sample correctly, in the same order; S ≥ 1, V ≥ 1.
        confidence: of the interval, in (0, 1).

    >>> one = np.array([[True, True, False, True], [True, True, True, True]])
    >>> other = np.array([[True, False, False, True], [True, True, False, False]])
    >>> crossed_difference(one, other, 0.95).mean
    37.5
    """
    return crossed_mean(one_SV.astype(np.int8) - other_SV.astype(np.int8), confidence)


def crossed_mean(table_SV: NDArray[np.int8], confidence: float) -> Difference:
    """Return the mean of a table in points, with an interval over seeds and validation samples.

    Seeds or samples that happen to agree are no certainty. The variance over seeds is at least that of rounding two
    accuracies to whole samples. The variance over samples is that of the samples and of two more, in one of which every
    run of the first arm is right and the second wrong, and the reverse in the other (compare Agresti and Min, "Simple
    improved confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005).

    Args:
        table_SV: small integers: d, or a contrast of more than two arms.
        confidence: of the interval, in (0, 1).
    """
    num_seeds, num_samples = table_SV.shape
    seeds_S, samples_V = table_SV.mean(1, dtype=np.float64), table_SV.mean(0, dtype=np.float64)
    mean = float(seeds_S.mean())
    if num_seeds == 1:
        return Difference(100.0 * mean, None, None)
    seed_squares = num_samples * float(np.square(seeds_S - mean).sum())
    sample_squares = num_seeds * float(np.square(samples_V - mean).sum())
    all_squares = float(np.square(table_SV, dtype=np.int32).sum()) - table_SV.size * mean * mean
    freedom = (num_seeds - 1) * max(num_samples - 1, 1)
    rest = max(all_squares - seed_squares - sample_squares, 0.0) / freedom
    per_seed = max(seed_squares / (num_seeds - 1), _ROUNDING_VARIANCE / num_samples)
    per_sample = max(sample_squares / max(num_samples - 1, 1) - rest, 0.0) + 2.0 * num_seeds / num_samples
    seed_se, sample_se = (100.0 * math.sqrt(part / table_SV.size) for part in (per_seed, per_sample))
    return Difference.of(100.0 * mean, seed_se, sample_se, num_seeds, confidence)


def paired_difference(one_S: Sequence[float], other_S: Sequence[float], confidence: float) -> Difference:
    """Return the mean of one − other over seeds, with the interval of the paired t-test.

    Args:
        one_S, other_S: the results of two arms, in the same order of seeds; at least one seed.
        confidence: of the interval, in (0, 1).

    >>> str(paired_difference([91.0, 92.0, 93.0], [90.0, 92.0, 91.0], 0.95))
    '+1.00 points (-1.48 to +3.48)'
    """
    differences_S = np.subtract(one_S, other_S, dtype=np.float64)
    deviation = float(differences_S.std(ddof=1)) if differences_S.size > 1 else 0.0
    seed_se = deviation / math.sqrt(differences_S.size)
    return Difference.of(float(differences_S.mean()), seed_se, 0.0, differences_S.size, confidence)


def paired_ratio(one_S: Sequence[float], other_S: Sequence[float], confidence: float) -> Difference:
    """Return the geometric mean of one ÷ other over seeds, with the interval of the paired t-test on logarithms.

    Ratios cancel a temporary slowdown of the machine, which affects both arms of a seed.

    Args:
        one_S, other_S: above 0, such as seconds, in the same order of seeds.
        confidence: of the interval, in (0, 1).
    """
    logs = paired_difference(np.log(one_S).tolist(), np.log(other_S).tolist(), confidence)
    low, high = (None if end is None else math.exp(min(end, _LARGEST_LOG)) for end in (logs.low, logs.high))
    return Difference(math.exp(logs.mean), low, high, num_seeds=logs.num_seeds)
