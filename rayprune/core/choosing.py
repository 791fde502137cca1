"""Scores into kept samples: the highest, the lowest, the middle or strata, over all samples or class by class.

Shapes: N samples, M kept, C classes, S strata. The count is exact, and of equal scores the lower ids are kept.

A draw that covers the range of scores: the strata of CCS.

Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023, arXiv 2210.15809: S bins of equal
width from the lowest score to just above the highest, each with the same budget as far as it has samples, and a uniform
draw inside. Deviation: the reference's upper edge, max·1.0001, lies below the maximum where all scores are negative and
loses that sample; here the maximum is always in the last bin.

Shapes: R rows, M drawn, S strata.

How many samples are kept: of all, and of each class.

Shapes: C classes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rayprune.core.references import closest
from rayprune.core.schedule import check_share
from rayprune.core.selection import Selection
from rayprune.errors import ConfigError

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
        ConfigError: neither, or out of range.

    >>> num_kept(0.29, 100), num_kept(0.5, 5), num_kept(1, 5), num_kept(1.0, 5)
    (29, 3, 1, 5)
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float | np.integer | np.floating):
        raise ConfigError(f"keep {keep!r} is no number: give a share such as 0.3 or a number of samples such as 1000")
    if isinstance(keep, int | np.integer):
        if not 1 <= keep <= num_samples:
            raise ConfigError(
                f"keep {keep} is outside 1..{num_samples}, the number of samples: give a number in that range, "
                "or a share such as 0.3"
            )
        return int(keep)
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep {keep!r} is a share outside (0, 1]: give a share such as 0.3, or a whole number")
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
        ConfigError: the count is out of range, or another balance.

    >>> quotas(np.array([5, 3]), 4, "proportional").tolist(), quotas(np.array([5, 3]), 5, "even").tolist()
    ([3, 1], [3, 2])
    >>> quotas(np.array([1, 9, 9]), 8, "even").tolist()
    [1, 4, 3]
    """
    if balance not in ("proportional", "even"):
        raise ConfigError(f"balance {balance!r} sets no quotas: {closest(str(balance), ('proportional', 'even'))}")
    room = np.asarray(sizes, dtype=np.int64)
    total = int(room.sum())
    if not 0 <= count <= total:
        raise ConfigError(f"count {count} is outside 0..{total}, the number of samples in all classes")
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


def strata_budgets(sizes: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    """Return how many CCS draws from each stratum: min(size, rest // strata left), smallest stratum first.

    Args:
        sizes: (S,) integers; empty strata count as strata left.
        count: in [0, sum of sizes].

    Returns:
        (S,) int64 with sum `count`.

    >>> strata_budgets(np.array([1, 0, 9, 9]), 8).tolist()
    [1, 0, 3, 4]
    """
    budgets = np.zeros(len(sizes), dtype=np.int64)
    rest = count
    for position, stratum in enumerate(np.argsort(sizes, kind="stable")):
        budgets[stratum] = min(int(sizes[stratum]), rest // (len(sizes) - position))
        rest -= int(budgets[stratum])
    return budgets


def draw_strata(
    rows: NDArray[np.int64],
    values: NDArray[np.float64],
    count: int,
    num_strata: int,
    rng: np.random.Generator,
    reweigh: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draw rows so that every part of the range of values is covered.

    Args:
        rows: (R,) ids, in ascending order of their values.
        values: (R,) finite numbers, ascending.
        count: M, in [1, R].
        num_strata: S.
        rng: the generator of the draw.
        reweigh: refuse strata with samples of which none is drawn.

    Returns:
        (M,) of the rows, and for each its stratum's size over the number drawn from it, (M,) float64.

    Raises:
        ConfigError: a stratum that cannot be weighed, or values too far apart.
    """
    ends = _strata_ends(values, num_strata)
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    budgets = strata_budgets(sizes, count)
    if reweigh and (empty := np.count_nonzero((budgets == 0) & (sizes > 0))):
        raise ConfigError(
            f"{count} samples leave {empty} of {np.count_nonzero(sizes)} strata with none, which no weight makes up "
            "for: take fewer strata, keep more, or leave reweigh out"
        )
    drawn = [
        start + (np.arange(size) if budget == size else rng.choice(size, budget, replace=False, shuffle=False))
        for start, size, budget in zip(starts, sizes, budgets, strict=True)
    ]
    weights = np.repeat(sizes / np.maximum(budgets, 1), budgets)
    return rows[np.concatenate(drawn)], weights


def _strata_ends(values: NDArray[np.float64], num_strata: int) -> NDArray[np.int64]:
    """Return where each stratum of ascending values ends, (S,)."""
    low, high = values[0], values[-1] + 1e-4 * abs(values[-1])
    with np.errstate(over="ignore"):
        width = (high - low) / num_strata
    if not np.isfinite(width):
        raise ConfigError(f"scores from {low:g} to {high:g} are too far apart for strata: scale them down")
    # The last stratum has no upper edge: nothing lies above it, whatever rounding does to high.
    inner = np.searchsorted(values, low + width * np.arange(1, num_strata), "left")
    return np.concatenate([inner, [values.size]]).astype(np.int64)


Rule = Literal["top", "bottom", "middle", "strata"]

__all__ = ["Balance", "Rule", "choose", "choose_by_boundary", "num_kept", "num_pruned", "quotas"]


def choose(
    scores: NDArray[Any],
    count: int,
    rule: Rule = "top",
    *,
    labels: NDArray[np.integer[Any]] | None = None,
    balance: Balance = "none",
    rng: np.random.Generator | None = None,
    num_strata: int = 50,
    drop_bottom: float = 0.0,
    drop_top: float = 0.0,
    reweigh: bool = False,
) -> Selection:
    """Choose exactly `count` samples by their scores.

    Args:
        scores: (N,) numbers without NaN.
        count: M, in [1, N less what is dropped first].
        rule: "top" keeps the highest, "bottom" the lowest, "middle" those about the median in sorted order, and
            "strata" draws so that the range of scores is covered (core/strata.py).
        labels: (N,) integers, needed to balance.
        balance: "none", or one of `quotas`, of what is left of each class; each class then follows the rule by itself.
        rng: the generator of the draw, needed by "strata" and used by nothing else.
        num_strata: S, for "strata".
        drop_bottom, drop_top: shares of all N in [0, 1), rounded down, that are never kept: those with the lowest and
            the highest scores, whatever their class.
        reweigh: with "strata", weigh by the stratum's size over the number drawn from it, so that weighted sums are
            without bias those over all that was not dropped; otherwise weights are 1.

    Returns:
        A Selection whose `requested` is 1 − M/N.

    Raises:
        ConfigError: a NaN, something out of range or unknown, missing labels or generator, or strata that cannot be
            weighed because the count leaves one of them without a sample.

    >>> choose(np.array([0.3, 0.9, 0.1, 0.9]), 2).ids.tolist(), choose(np.array([5, 5, 5]), 2, "bottom").ids.tolist()
    ([1, 3], [0, 1])
    """
    _check_choice(scores, rule, balance, labels, rng, num_strata, drop_bottom, drop_top, reweigh)
    order = np.argsort(scores, kind="stable")
    skipped = num_pruned(drop_bottom, scores.size)
    left = scores.size - skipped - num_pruned(drop_top, scores.size)
    _check_count(count, left, scores.size)
    candidates = _block(order, scores, skipped, left)
    ids, weights = [], []
    for rows, quota in _classes(candidates, count, labels, balance):
        kept, weight = _by_rule(rule, rows, scores, quota, num_strata, rng, reweigh)
        ids.append(kept)
        weights.append(weight)
    return Selection.of_ids(
        np.concatenate(ids),
        scores.size,
        weights=np.concatenate(weights) if reweigh else None,
        requested=1.0 - count / scores.size,
        expected_drops=scores.size - count,
    )


def _check_count(count: int, left: int, num_samples: int) -> None:
    if left < 1:
        raise ConfigError("drop_bottom and drop_top together leave no sample to choose from: lower them")
    if not 1 <= count <= left:
        dropped = f" after {num_samples - left} are dropped" if left < num_samples else ""
        raise ConfigError(f"count {count} is outside 1..{left}, the samples there are to choose from{dropped}")


def choose_by_boundary(distances: NDArray[np.float32], count: int) -> Selection:
    """Choose `count` samples near every class's boundary (BASE, Emam et al. 2021, arXiv 2111.12880).

    Args:
        distances: (N, C) from each sample to the boundary of each class.
        count: M, in [1, N].

    Returns:
        A Selection in which class after class took its even share of the samples left, nearest to its boundary first.

    >>> choose_by_boundary(np.array([[0.1, 0.9], [0.2, 0.3], [0.8, 0.7]]), 2).ids.tolist()
    [0, 1]
    """
    num_samples, num_classes = distances.shape
    left = np.ones(num_samples, dtype=bool)
    for label, quota in enumerate(quotas(np.full(num_classes, num_samples), count, "even").tolist()):
        ids = np.flatnonzero(left)
        left[ids[np.argsort(distances[ids, label], kind="stable")[:quota]]] = False
    return Selection.of_mask(~left, 1.0 - count / num_samples, num_samples - count)


def _check_choice(
    scores: NDArray[Any],
    rule: str,
    balance: str,
    labels: NDArray[Any] | None,
    rng: np.random.Generator | None,
    num_strata: int,
    drop_bottom: float,
    drop_top: float,
    reweigh: bool,
) -> None:
    for name, value, valid in (("rule", rule, get_args(Rule)), ("balance", balance, get_args(Balance))):
        if value not in valid:
            raise ConfigError(f"{name} {value!r} is unknown: {closest(str(value), valid)}")
    if scores.ndim != 1 or scores.dtype.kind not in "biuf":
        raise ConfigError(f"scores must be a 1-d array of numbers, got {scores.dtype} of shape {scores.shape}")
    _refuse_nan(scores)
    check_share("drop_bottom", drop_bottom)
    check_share("drop_top", drop_top)
    if balance != "none" and labels is None:
        raise ConfigError(f"balance {balance!r} needs labels")
    if labels is not None and (labels.shape != scores.shape or labels.dtype.kind not in "iu"):
        raise ConfigError(f"labels must be {scores.size} integers, got {labels.dtype} of shape {labels.shape}")
    if reweigh and rule != "strata":
        raise ConfigError(f"reweigh goes with the rule 'strata', not {rule!r}: the other rules draw nothing at random")
    if rule == "strata":
        if rng is None:
            raise ConfigError("the rule 'strata' draws at random: give rng")
        if num_strata < 1:
            raise ConfigError(f"num_strata {num_strata} is below 1")
        if infinite := np.count_nonzero(~np.isfinite(scores)):
            raise ConfigError(f"{infinite} of {scores.size} scores are infinite: strata need a finite range, take top")


def _refuse_nan(scores: NDArray[Any]) -> None:
    if scores.dtype.kind == "f" and (missing := np.flatnonzero(np.isnan(scores))).size:
        raise ConfigError(f"{missing.size} of {scores.size} scores are NaN, first ids {missing[:5].tolist()}")


def _by_class(
    rows: NDArray[np.int64], labels: NDArray[np.integer[Any]], num_classes: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each class and those of the rows whose label it is, in their order."""
    # Few classes fit one or two bytes, which NumPy sorts in linear time.
    narrow = labels.astype(np.min_scalar_type(max(num_classes - 1, 0)), copy=False)
    grouped = rows[np.argsort(narrow, kind="stable")]
    ends = np.cumsum(np.bincount(narrow, minlength=num_classes))
    yield from enumerate(np.split(grouped, ends[:-1]))


def _classes(
    candidates: NDArray[np.int64], count: int, labels: NDArray[np.integer[Any]] | None, balance: Balance
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Yield the sorted rows that compete with each other and how many of them are kept."""
    if balance == "none" or labels is None:
        yield candidates, count
        return
    values, classes = np.unique(labels[candidates], return_inverse=True)
    quota_C = quotas(np.bincount(classes), count, balance)
    for number, rows in _by_class(candidates, classes, values.size):
        yield rows, int(quota_C[number])


def _by_rule(
    rule: Rule,
    rows: NDArray[np.int64],
    scores: NDArray[Any],
    count: int,
    num_strata: int,
    rng: np.random.Generator | None,
    reweigh: bool,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return `count` of rows sorted by (score, id), and their weights."""
    if rule == "strata":
        assert rng is not None
        return draw_strata(rows, scores[rows].astype(np.float64), count, num_strata, rng, reweigh)
    start = {"bottom": 0, "middle": (rows.size - count) // 2, "top": rows.size - count}[rule]
    return _block(rows, scores, start, count), np.ones(count)


def _block(rows: NDArray[np.int64], scores: NDArray[Any], start: int, count: int) -> NDArray[np.int64]:
    """Return `count` of rows sorted by (score, id) from `start` on, but of the lowest score taken the lower ids."""
    stop = start + count
    if not 0 < start < stop:
        return rows[start:stop]
    values = scores[rows]
    first, last = (int(np.searchsorted(values, values[start], side)) for side in ("left", "right"))
    tied = min(last, stop) - start
    return np.concatenate([rows[first : first + tied], rows[start + tied : stop]])
