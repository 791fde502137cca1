"""Keep ratios of blocks of epochs whose mean over the run is a budget, exactly.

A run of E epochs is cut into a warm-up of W epochs and blocks of Q (the last may be shorter). Warm-up and block 1 use
everything; each family of schedules has one free number, which is solved so that the sum of kept ratios over all epochs
is budget·E. DynaMS (Wang et al., ICLR 2023) names the power law; that block 1 is full, that the warm-up counts, and the
other families are decisions of this project.

Shapes: K blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Literal, get_args

from rayprune.core.objects import closest

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
        ValueError: an unknown family, or a budget that no schedule of the family reaches, with the least it does.

    >>> [round(kept, 4) for kept in kept_by_block("power", 0.6, 200, 10)][:2]
    [1.0, 0.8401]
    >>> round(kept_by_block("polynomial", 0.6, 200, 10, 20)[-1], 4)
    0.3234
    """
    if family not in get_args(Family):
        raise ValueError(f"schedule {family!r} is none: {closest(str(family), get_args(Family))}")
    starts = block_starts(num_epochs, block_epochs, warmup_epochs)
    if not starts and budget < 1.0:
        raise ValueError(f"warmup_epochs {warmup_epochs} leaves none of {num_epochs} epochs to prune: lower it")
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
        raise ValueError(
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
