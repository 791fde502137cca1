"""The requested prune ratio as a function of training progress.

A Schedule is called with (epoch, num_epochs) and returns the prune ratio r of that epoch, in [0, 1). Any method that
takes a ratio takes a schedule: a number is the constant schedule, a mapping `{schedule: NAME, ...}` builds one by name.

The power law γ_k = k^(−ρ) over K blocks with a given budget is the reading of DynaMS (Wang et al., ICLR 2023) that
this project decided on; the paper names the law but not its constants.

Keep ratios of blocks of epochs whose mean over the run is a budget, exactly.

A run of E epochs is cut into a warm-up of W epochs and blocks of Q (the last may be shorter). Warm-up and block 1 use
everything; each family of schedules has one free number, which is solved so that the sum of kept ratios over all epochs
is budget·E. DynaMS (Wang et al., ICLR 2023) names the power law; that block 1 is full, that the warm-up counts, and the
other families are decisions of this project.

Shapes: K blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, ClassVar, Literal, TypeVar, get_args

from rayprune.core.references import closest
from rayprune.core.validation import check_fields, check_keys, make_fields_plain, shown, wrong_type
from rayprune.errors import ConfigError

SCHEDULES: dict[str, type[Schedule]] = {}
_BELOW_ONE = math.nextafter(1.0, 0.0)  # where a ratio just below 1 would round to 1
_S = TypeVar("_S", bound="type[Schedule]")


def _named(name: str) -> Callable[[_S], _S]:
    def register(cls: _S) -> _S:
        cls.name = name
        SCHEDULES[name] = cls
        return cls

    return register


def first_full_epoch(fraction: float, num_epochs: int) -> int:
    """Return floor(δE), the first epoch of the final full-data phase; robust to products like .29 × 100 = 28.999….

    >>> [first_full_epoch(0.875, e) for e in (8, 10, 90, 200, 300)]
    [7, 8, 78, 175, 262]
    """
    return math.floor(fraction * num_epochs + 1e-9)


def check_ratio(name: str, value: float) -> None:
    """Raise ValueError unless value is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ConfigError(f"{name} {value!r} is outside [0, 1): 0 keeps everything, .5 drops half")


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless value is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name} {value!r} is outside [0, 1]")


@dataclass(frozen=True)
class Schedule:
    """Give the requested prune ratio of an epoch; the base of all schedules."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        make_fields_plain(self)
        check_fields(self)

    def __call__(self, epoch: int, num_epochs: int) -> float:
        """Return r for `epoch` (0-based) of `num_epochs`, in [0, 1)."""
        if not 0 <= epoch < num_epochs:
            raise ConfigError(f"epoch {epoch} is outside [0, {num_epochs})")
        return min(self.ratio(epoch, num_epochs), _BELOW_ONE)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return r; subclasses define it."""
        raise TypeError(f"{type(self).__name__} defines no ratio()")

    @staticmethod
    def of(value: float | Schedule | Mapping[str, Any], key: str = "prune_ratio") -> Schedule:
        """Make a schedule of a number, a mapping with the key `schedule`, or a Schedule.

        Args:
            value: what to make it of.
            key: what messages call it.

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
            if problem := wrong_type(value, float):
                raise ConfigError(f"{key} = {shown(value)}: {problem}, or a mapping such as {{schedule: linear}}")
            return Constant(value)
        options = dict(value)
        name = options.pop("schedule", None)
        if not isinstance(name, str) or name not in SCHEDULES:
            raise ConfigError(f"{key}: unknown schedule {shown(name)}: {closest(str(name), SCHEDULES)}")
        check_keys(SCHEDULES[name], options, key, f"schedule {name!r}")
        return SCHEDULES[name](**options)

    def to_config(self) -> float | dict[str, Any]:
        """Return what `of` takes, in plain YAML types."""
        plain = dataclasses.asdict(self)
        return {"schedule": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}}


def _fraction(epoch: int, num_epochs: int) -> float:
    return epoch / (num_epochs - 1) if num_epochs > 1 else 1.0


@_named("constant")
@dataclass(frozen=True)
class Constant(Schedule):
    """The same ratio in every epoch."""

    value: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("prune ratio", self.value)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return the constant."""
        return float(self.value)

    def to_config(self) -> float | dict[str, Any]:
        """Return the number itself."""
        return float(self.value)


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float = 0.0
    end: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("start", self.start)
        check_ratio("end", self.end)


@_named("linear")
@dataclass(frozen=True)
class Linear(_Ramp):
    """From `start` in the first epoch to `end` in the last along a line.

    >>> [round(Linear(0.0, 0.4)(e, 5), 3) for e in range(5)]
    [0.0, 0.1, 0.2, 0.3, 0.4]
    """

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return the point on the line."""
        return self.start + (self.end - self.start) * _fraction(epoch, num_epochs)


@_named("cosine")
@dataclass(frozen=True)
class Cosine(_Ramp):
    """From `start` to `end` along half a cosine wave.

    >>> [round(Cosine(0.0, 0.4)(e, 5), 3) for e in range(5)]
    [0.0, 0.059, 0.2, 0.341, 0.4]
    """

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return the point on the wave."""
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * _fraction(epoch, num_epochs))) / 2


@_named("polynomial")
@dataclass(frozen=True)
class Polynomial(_Ramp):
    """Keep γ_f + (γ_0 − γ_f)(1 − x)^p with γ = 1 − r: fast at first for p > 1.

    >>> [round(Polynomial(0.0, 0.4, power=2)(e, 5), 3) for e in range(5)]
    [0.0, 0.175, 0.3, 0.375, 0.4]
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ConfigError(f"power {self.power!r} must be above 0")

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return the point on the polynomial."""
        left: float = (1.0 - _fraction(epoch, num_epochs)) ** self.power
        return self.end + (self.start - self.end) * left


@_named("power")
@dataclass(frozen=True)
class Power(Schedule):
    """Keep γ_k = k^(−ρ) in block k = 1..K of equal length, with ρ solved so that the mean of γ is the budget.

    >>> power = Power(budget=0.6, blocks=20)
    >>> round(power.exponent, 5), round(1 - power(1, 20), 5), round(1 - power(19, 20), 5)
    (0.2514, 0.84008, 0.4709)
    """

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
        """ρ by bisection: the mean of k^(−ρ) falls monotonically in ρ."""
        low, high = 0.0, 1.0
        while self._mean_kept(high) > self.budget:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean_kept(middle) > self.budget else (low, middle)
        return (low + high) / 2

    def _mean_kept(self, exponent: float) -> float:
        return math.fsum(k**-exponent for k in range(1, self.blocks + 1)) / self.blocks

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return 1 − γ of the block that the epoch lies in."""
        block = epoch * self.blocks // num_epochs + 1
        return float(1.0 - block**-self.exponent)


@_named("step")
@dataclass(frozen=True)
class Step(Schedule):
    """Jump to `ratios[i]` at the share `milestones[i]` of the run; `start` before the first.

    >>> [Step(milestones=(0.5, 0.75), ratios=(0.3, 0.6))(e, 4) for e in range(4)]
    [0.0, 0.0, 0.3, 0.6]
    """

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
        """Return the ratio of the last milestone reached."""
        current = self.start
        for milestone, ratio in zip(self.milestones, self.ratios, strict=True):
            if epoch >= first_full_epoch(milestone, num_epochs):
                current = ratio
        return current


@_named("annealed")
@dataclass(frozen=True)
class AnnealedToFull(Schedule):
    """Follow another schedule, then train on everything from epoch floor(δE) on (InfoBatch's annealing).

    >>> [AnnealedToFull(0.5, until=0.5)(e, 5) for e in range(5)]
    [0.5, 0.5, 0.0, 0.0, 0.0]
    """

    of_ratio: Any = 0.5
    until: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "of_ratio", Schedule.of(self.of_ratio, "of_ratio"))
        check_share("until", self.until)

    def ratio(self, epoch: int, num_epochs: int) -> float:
        """Return the inner ratio before floor(δE), 0 from there on."""
        if epoch >= first_full_epoch(self.until, num_epochs):
            return 0.0
        return float(self.of_ratio(epoch, num_epochs))

    def to_config(self) -> float | dict[str, Any]:
        """Return the nested mapping."""
        return {"schedule": self.name, "of_ratio": self.of_ratio.to_config(), "until": self.until}


Family = Literal["power", "polynomial", "linear", "constant", "step"]
_LARGEST_EXPONENT = 64.0


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
    """Return the K keep ratios, in (0, 1], the first one 1.

    Args:
        family: `power` γ_k = k^(−ρ); `polynomial` γ_f + (1 − γ_f)(1 − x)^power with x from 0 in block 1 to 1 in block
            K; `linear`, the same with power 1; `constant` from block 2 on; `step`, the same factor at each milestone.
        budget: share of all N·E visits that is kept, in (0, 1].
        num_epochs, block_epochs, warmup_epochs: E, Q, W.
        power: of `polynomial`.
        milestones: of `step`: shares of the run after which the ratio falls; a block falls when it begins there.

    Raises:
        ConfigError: an unknown family, or a budget that no schedule of the family reaches, with the least it does.

    >>> [round(kept, 4) for kept in kept_by_block("power", 0.6, 200, 10)][:2]
    [1.0, 0.8401]
    >>> round(kept_by_block("polynomial", 0.6, 200, 10, 20)[-1], 4)
    0.3234
    """
    if family not in get_args(Family):
        raise ConfigError(f"schedule {family!r} is none: {closest(str(family), get_args(Family))}")
    starts = block_starts(num_epochs, block_epochs, warmup_epochs)
    if not starts and budget < 1.0:
        raise ConfigError(f"warmup_epochs {warmup_epochs} leaves none of {num_epochs} epochs to prune: lower it")
    if budget >= 1.0:
        return [1.0] * len(starts)
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], num_epochs], strict=True)]
    ratios = _family(family, starts, num_epochs, power, milestones)
    wanted = budget * num_epochs - warmup_epochs

    def visits(hardness: float) -> float:
        return math.fsum(n * kept for n, kept in zip(lengths, ratios(hardness), strict=True))

    low, high = 0.0, 1.0
    if visits(high) >= wanted:
        least = (visits(high) + warmup_epochs) / num_epochs
        full = warmup_epochs + lengths[0]
        raise ConfigError(
            f"budget {budget:g} can't be reached: {full} of {num_epochs} epochs use everything (warm-up and block 1), "
            f"and the {family} schedule keeps at least {least:.3f}; raise it, or lower block_epochs or warmup_epochs"
        )
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if visits(middle) > wanted else (low, middle)
    return ratios((low + high) / 2)


def _family(
    family: Family, starts: Sequence[int], num_epochs: int, power: float, milestones: Sequence[float]
) -> Callable[[float], list[float]]:
    """Return hardness in [0, 1] → the K keep ratios: all 1 at 0, the family's least at 1, falling in between."""
    count = len(starts)
    if family == "power":
        return lambda hardness: [k ** -(_LARGEST_EXPONENT * hardness) for k in range(1, count + 1)]
    if family == "constant":
        return lambda hardness: [1.0] + [1.0 - hardness] * (count - 1)
    if family == "step":
        # Robust to products like .3 × 10 = 3.0000000000000004.
        passed = [sum(start >= math.floor(m * num_epochs + 1e-9) for m in milestones) for start in starts]
        falls = [0, *accumulate(max(0, b - a) for a, b in pairwise(passed))]
        return lambda hardness: [(1.0 - hardness) ** fall for fall in falls]
    exponent = 1.0 if family == "linear" else power
    left = [(1.0 - k / max(count - 1, 1)) ** exponent for k in range(count)]
    return lambda hardness: [1.0 - hardness * (1.0 - each) for each in left]
