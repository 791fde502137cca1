"""The requested prune ratio as a function of training progress, and keep ratios that meet a budget.

A `Schedule` maps (epoch, num_epochs) to the prune ratio r of that epoch, in [0, 1). Every method that takes a ratio
takes a schedule: a number is the constant schedule, and a mapping `{schedule: NAME, ...}` builds one by name.

`kept_by_block` instead solves for a budget. A run of E epochs is a warm-up of W epochs followed by blocks of Q epochs
(the last block may be shorter). The warm-up and block 1 use all samples. Each schedule family has one free parameter,
chosen so that the keep ratios of all epochs sum to budget·E. DynaMS (Wang et al., ICLR 2023) names the power law
γ_k = k^(−ρ) but not its constants; the full block 1, counting the warm-up, and the other families are decisions of this
project.

Shapes: K blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

from rayprune.core.references import closest
from rayprune.core.validation import (
    check_fields,
    check_keys,
    check_ratio,
    check_share,
    fields_to_yaml,
    mismatch,
    short_repr,
)
from rayprune.errors import ConfigError

Family = Literal["power", "polynomial", "linear", "constant", "step"]

_BELOW_ONE = math.nextafter(1.0, 0.0)  # for a ratio just below 1 that rounds to 1
_MAX_EXPONENT = 64.0


@dataclass(frozen=True)
class Schedule:
    """Return the requested prune ratio of an epoch; the base class of all schedules."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, epoch: int, num_epochs: int) -> float:
        """Return r for `epoch` (0-based) of `num_epochs`, in [0, 1)."""
        if not 0 <= epoch < num_epochs:
            raise ConfigError(f"epoch {epoch} is outside [0, {num_epochs})")
        return min(self.ratio(epoch, num_epochs), _BELOW_ONE)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return r; every subclass defines it."""
        raise TypeError(f"{type(self).__name__} defines no ratio()")

    @staticmethod
    def of(value: float | Schedule | Mapping[str, Any], key: str = "prune_ratio") -> Schedule:
        """Build a schedule from a number, a mapping with the key `schedule`, or a Schedule; messages name it `key`.

        Raises:
            ConfigError: unknown schedule or key (with the closest match), or a value of another type or out of range.

        >>> Schedule.of(0.5)(3, 10)
        0.5
        >>> Schedule.of({"schedule": "linear", "start": 0.0, "end": 0.5})(9, 10)
        0.5
        """
        if isinstance(value, Schedule):
            return value
        if not isinstance(value, Mapping):
            if problem := mismatch(value, float):
                raise ConfigError(f"{key} = {short_repr(value)}: {problem}, or a mapping such as {{schedule: linear}}")
            return Constant(value)
        options = dict(value)
        name = options.pop("schedule", None)
        if not isinstance(name, str) or name not in SCHEDULES:
            raise ConfigError(f"{key}: unknown schedule {short_repr(name)}: {closest(str(name or ''), SCHEDULES)}")
        check_keys(SCHEDULES[name], options, key, f"schedule {name!r}")
        return SCHEDULES[name](**options)

    def to_config(self) -> float | dict[str, Any]:
        """Return the schedule in plain YAML types, as `of` takes it."""
        return {"schedule": self.name, **fields_to_yaml(self)}


@dataclass(frozen=True)
class Constant(Schedule):
    """The same ratio in every epoch.

    Args:
        value: the prune ratio, in [0, 1).
    """

    name = "constant"
    value: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("prune ratio", self.value)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        return float(self.value)

    def to_config(self) -> float:
        return float(self.value)


@dataclass(frozen=True)
class _Ramp(Schedule):
    """A ratio that changes in every epoch.

    Args:
        start: the prune ratio of the first epoch, in [0, 1).
        end: the prune ratio of the last epoch, in [0, 1).
    """

    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("start", self.start)
        check_ratio("end", self.end)


def _progress(epoch: int, num_epochs: int) -> float:
    """Return 0 in the first epoch to 1 in the last; 1 in a run of one epoch."""
    return epoch / (num_epochs - 1) if num_epochs > 1 else 1.0


@dataclass(frozen=True)
class Linear(_Ramp):
    """A line from `start` in the first epoch to `end` in the last.

    >>> [round(Linear(0.0, 0.4)(e, 5), 3) for e in range(5)]
    [0.0, 0.1, 0.2, 0.3, 0.4]
    """

    name = "linear"

    def ratio(self, epoch: int, num_epochs: int) -> float:
        return self.start + (self.end - self.start) * _progress(epoch, num_epochs)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine wave from `start` to `end`.

    >>> [round(Cosine(0.0, 0.4)(e, 5), 3) for e in range(5)]
    [0.0, 0.059, 0.2, 0.341, 0.4]
    """

    name = "cosine"

    def ratio(self, epoch: int, num_epochs: int) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * _progress(epoch, num_epochs))) / 2


@dataclass(frozen=True)
class Polynomial(_Ramp):
    """Keep γ_f + (γ_0 − γ_f)(1 − x)^p with γ = 1 − r; for p > 1 the keep ratio falls fastest at the start.

    Args:
        power: p, above 0.

    >>> [round(Polynomial(0.0, 0.4, power=2)(e, 5), 3) for e in range(5)]
    [0.0, 0.175, 0.3, 0.375, 0.4]
    """

    name = "polynomial"
    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ConfigError(f"power {self.power!r} must be above 0")

    def ratio(self, epoch: int, num_epochs: int) -> float:
        remaining: float = (1.0 - _progress(epoch, num_epochs)) ** self.power
        return self.end + (self.start - self.end) * remaining


@dataclass(frozen=True)
class Power(Schedule):
    """Keep γ_k = k^(−ρ) in block k = 1..K of equal length, with ρ such that the mean of γ is the budget.

    Args:
        budget: the mean keep ratio of the run, in (1/K, 1].
        blocks: K, at least 1.

    >>> power = Power(budget=0.6, blocks=20)
    >>> round(power.exponent, 5), round(1 - power(1, 20), 5), round(1 - power(19, 20), 5)
    (0.2514, 0.84008, 0.4709)
    """

    name = "power"
    budget: float = 0.6
    blocks: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise ConfigError(f"blocks {self.blocks!r} must be at least 1")
        least = 1.0 / self.blocks
        if not least < self.budget <= 1.0:
            raise ConfigError(f"budget {self.budget!r} is outside ({least:g}, 1] for {self.blocks} blocks")

    @cached_property
    def exponent(self) -> float:
        """ρ."""

        def mean_kept(exponent: float) -> float:
            return math.fsum(k**-exponent for k in range(1, self.blocks + 1)) / self.blocks

        high = 1.0
        while mean_kept(high) > self.budget:
            high *= 2
        return _bisect(mean_kept, self.budget, high)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        block = epoch * self.blocks // num_epochs + 1
        return float(1.0 - block**-self.exponent)


@dataclass(frozen=True)
class Step(Schedule):
    """Switch to `ratios[i]` at the share `milestones[i]` of the run; `start` before the first milestone.

    Args:
        milestones: ascending shares of the run, in [0, 1].
        ratios: the prune ratio from each milestone on, in [0, 1).
        start: the prune ratio before the first milestone, in [0, 1).

    >>> [Step(milestones=(0.5, 0.75), ratios=(0.3, 0.6))(e, 4) for e in range(4)]
    [0.0, 0.0, 0.3, 0.6]
    """

    name = "step"
    milestones: tuple[float, ...] = (0.5,)
    ratios: tuple[float, ...] = (0.5,)
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("start", self.start)
        if len(self.milestones) != len(self.ratios) or list(self.milestones) != sorted(set(self.milestones)):
            raise ConfigError(f"milestones {self.milestones} must ascend, with one ratio each, got {self.ratios}")
        for milestone, ratio in zip(self.milestones, self.ratios, strict=True):
            check_share("milestone", milestone)
            check_ratio("ratio", ratio)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        num_reached = sum(epoch >= epoch_at(milestone, num_epochs) for milestone in self.milestones)
        return (self.start, *self.ratios)[num_reached]


@dataclass(frozen=True)
class AnnealedToFull(Schedule):
    """Follow another schedule, then train on all samples from epoch floor(δE) on (InfoBatch's annealing).

    Args:
        of_ratio: a number in [0, 1) or another schedule.
        until: δ, a share of the run, in [0, 1].

    >>> [AnnealedToFull(0.5, until=0.5)(e, 5) for e in range(5)]
    [0.5, 0.5, 0.0, 0.0, 0.0]
    """

    name = "annealed"
    of_ratio: Any = 0.5
    until: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "of_ratio", Schedule.of(self.of_ratio, "of_ratio"))
        check_share("until", self.until)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        full = epoch >= epoch_at(self.until, num_epochs)
        return 0.0 if full else float(self.of_ratio(epoch, num_epochs))


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule for schedule in (Constant, Linear, Cosine, Polynomial, Power, Step, AnnealedToFull)
}


def epoch_at(share: float, num_epochs: int) -> int:
    """Return floor(δE), the first epoch after a share δ of the run; robust to products such as 0.29 × 100 = 28.999….

    >>> [epoch_at(0.875, e) for e in (8, 10, 90, 200, 300)]
    [7, 8, 78, 175, 262]
    """
    return math.floor(share * num_epochs + 1e-9)


def block_starts(num_epochs: int, block_epochs: int, warmup_epochs: int = 0) -> list[int]:
    """Return the first epoch of each block.

    >>> block_starts(25, 10, 2)
    [2, 12, 22]
    """
    return list(range(warmup_epochs, num_epochs, block_epochs))


def kept_by_block(
    family: Family,
    budget: float,
    num_epochs: int,
    block_epochs: int,
    warmup_epochs: int = 0,
    *,
    power: float = 2.0,
    milestones: Sequence[float] = (0.5, 0.75),
) -> list[float]:
    """Return the K keep ratios that meet a budget, in (0, 1]; the first is 1.

    Args:
        family: `power` γ_k = k^(−ρ); `polynomial` γ_f + (1 − γ_f)(1 − x)^power with x from 0 in block 1 to 1 in block
            K; `linear`, the same with power 1; `constant` from block 2 on; `step`, the same factor at each milestone.
        budget: the share of all N·E visits to keep, in (0, 1].
        num_epochs, block_epochs, warmup_epochs: E, Q, W.
        power: the exponent of `polynomial`.
        milestones: the shares of the run at which `step` lowers the ratio, for blocks that start there or later.

    Raises:
        ConfigError: a budget below the least that the family can reach.

    >>> [round(kept, 4) for kept in kept_by_block("power", 0.6, 200, 10)][:2]
    [1.0, 0.8401]
    >>> round(kept_by_block("polynomial", 0.6, 200, 10, 20)[-1], 4)
    0.3234
    """
    starts = block_starts(num_epochs, block_epochs, warmup_epochs)
    if not starts and budget < 1.0:
        raise ConfigError(f"warmup_epochs {warmup_epochs} leaves none of {num_epochs} epochs to prune: lower it")
    if budget >= 1.0:
        return [1.0] * len(starts)
    lengths = [stop - start for start, stop in pairwise([*starts, num_epochs])]
    ratios = _ratios_by_hardness(family, starts, num_epochs, power, milestones)

    def epochs_kept(hardness: float) -> float:
        return math.fsum(n * kept for n, kept in zip(lengths, ratios(hardness), strict=True))

    target = budget * num_epochs - warmup_epochs
    if epochs_kept(1.0) >= target:
        least = (epochs_kept(1.0) + warmup_epochs) / num_epochs
        full = warmup_epochs + lengths[0]
        raise ConfigError(
            f"budget {budget:g} can't be reached: {full} of {num_epochs} epochs use all samples (warm-up and block 1) "
            f"and the {family} schedule keeps at least {least:.3f}; raise it, or lower block_epochs or warmup_epochs"
        )
    return ratios(_bisect(epochs_kept, target, 1.0))


def _ratios_by_hardness(
    family: Family, starts: Sequence[int], num_epochs: int, power: float, milestones: Sequence[float]
) -> Callable[[float], list[float]]:
    """Return a function from hardness in [0, 1] to K keep ratios: all 1 at 0, decreasing to the family's least at 1."""
    count = len(starts)
    if family == "power":
        return lambda hardness: [k ** -(_MAX_EXPONENT * hardness) for k in range(1, count + 1)]
    if family == "constant":
        return lambda hardness: [1.0] + [1.0 - hardness] * (count - 1)
    if family == "step":
        reached = [sum(start >= epoch_at(m, num_epochs) for m in milestones) for start in starts]
        return lambda hardness: [(1.0 - hardness) ** (count - reached[0]) for count in reached]
    exponent = 1.0 if family == "linear" else power
    remaining = [(1.0 - k / max(count - 1, 1)) ** exponent for k in range(count)]
    return lambda hardness: [1.0 - hardness * (1.0 - each) for each in remaining]


def _bisect(decreasing: Callable[[float], float], target: float, high: float) -> float:
    """Return x in [0, high] where a decreasing function reaches the target."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > target else (low, middle)
    return (low + high) / 2
