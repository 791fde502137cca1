"""How many samples are kept: of all, and of each class.

Shapes: C classes.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.objects import closest

Balance = Literal["none", "proportional", "even"]


def num_pruned(prune_ratio: float, num_samples: int) -> int:
    """Return floor(r·N), guarding products such as .29 × 100 = 28.999….

    >>> num_pruned(0.5, 5), num_pruned(0.29, 100)
    (2, 29)
    """
    # The product of two rounded numbers is off by about 2e-16 of itself: more than 1e-9 from N = 10^8 on.
    return int(np.floor(prune_ratio * num_samples * (1 + 1e-15) + 1e-9))


def num_kept(keep: float, num_samples: int) -> int:
    """Return how many samples `keep` means.

    Args:
        keep: a float is a share in (0, 1], of which N − floor((1 − keep)·N) are kept, so that a share rounds up and
            agrees with a prune ratio of 1 − keep; an int is the number itself, in [1, N].
        num_samples: N.

    Raises:
        ValueError: neither, or out of range.

    >>> num_kept(0.29, 100), num_kept(0.5, 5), num_kept(1, 5), num_kept(1.0, 5)
    (29, 3, 1, 5)
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float | np.integer | np.floating):
        raise ValueError(f"keep {keep!r} is no number: give a share such as 0.3 or a number of samples such as 1000")
    if isinstance(keep, int | np.integer):
        if not 1 <= keep <= num_samples:
            raise ValueError(
                f"keep {keep} is outside 1..{num_samples}, the number of samples: give a number in that range, "
                "or a share such as 0.3"
            )
        return int(keep)
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep {keep!r} is a share outside (0, 1]: give a share such as 0.3, or a whole number")
    # A share that is all but 0 still keeps a sample.
    return max(num_samples - num_pruned(1.0 - float(keep), num_samples), min(num_samples, 1))


def quotas(sizes: NDArray[np.integer[Any]], count: int, balance: Balance) -> NDArray[np.int64]:
    """Divide a count among classes.

    Args:
        sizes: (C,) integers, the samples that each class has.
        count: how many to keep of all, in [0, sum of sizes].
        balance: "proportional" keeps the same share of every class: shares are rounded down and the largest remainders
            get one more, of equal ones the lower classes; "even" keeps the same number of every class: what a class
            is too small for goes evenly to those with room, and what is left over to the lower ones of these.

    Returns:
        (C,) int64, none above its size, with sum `count`.

    Raises:
        ValueError: the count is out of range, or another balance.

    >>> quotas(np.array([5, 3]), 4, "proportional").tolist(), quotas(np.array([5, 3]), 5, "even").tolist()
    ([3, 1], [3, 2])
    >>> quotas(np.array([1, 9, 9]), 8, "even").tolist()
    [1, 4, 3]
    """
    if balance not in ("proportional", "even"):
        raise ValueError(f"balance {balance!r} sets no quotas: {closest(str(balance), ('proportional', 'even'))}")
    room = np.asarray(sizes, dtype=np.int64)
    total = int(room.sum())
    if not 0 <= count <= total:
        raise ValueError(f"count {count} is outside 0..{total}, the number of samples in all classes")
    if balance == "proportional":
        # In whole numbers: count·size is exact below 2^63, so for three billion samples.
        given, remainder = np.divmod(count * room, max(total, 1))
        order = np.argsort(-remainder, kind="stable")
    else:
        level = bisect_right(range(int(room.max(initial=0)) + 1), count, key=lambda n: int(np.minimum(room, n).sum()))
        given = np.minimum(room, level - 1)
        order = np.flatnonzero(room > given)
    given[order[: count - int(given.sum())]] += 1
    return given
