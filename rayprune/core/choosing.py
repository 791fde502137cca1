"""Choose samples by their scores: the highest, the lowest, the middle or strata, over all samples or class by class.

The count is exact, and among equal scores the lower ids are kept.

Strata are those of CCS (Zheng et al., "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023, arXiv
2210.15809): S bins of equal width from the lowest score to just above the highest, with equal budgets as far as each
bin has samples, and a uniform draw inside each bin. Deviation: the reference's upper edge, max·1.0001, lies below the
maximum where all scores are negative and loses that sample; here the maximum is always in the last bin.

Shapes: N samples, M kept, C classes, S strata, R rows that compete for a count.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rayprune.core.references import closest
from rayprune.core.selection import Selection
from rayprune.core.table import Ids
from rayprune.core.validation import check_share, short_repr
from rayprune.errors import ConfigError, DataError

Rule = Literal["top", "bottom", "middle", "strata"]
Balance = Literal["none", "proportional", "even", "drop"]


def choose(
    scores: NDArray[Any],
    count: int,
    rule: Rule = "top",
    *,
    labels: NDArray[np.integer[Any]] | None = None,
    balance: Balance = "none",
    recalls: NDArray[np.floating[Any]] | None = None,
    rng: np.random.Generator | None = None,
    num_strata: int = 50,
    drop_bottom: float = 0.0,
    drop_top: float = 0.0,
    reweigh: bool = False,
) -> Selection:
    """Choose exactly `count` samples by their scores; the Selection's `requested` is 1 − M/N.

    Args:
        scores: (N,) numbers without NaN.
        count: M, in [1, N less the samples dropped first].
        rule: "top" keeps the highest scores, "bottom" the lowest, "middle" those around the median in sorted order;
            "strata" draws from the whole range of scores.
        labels: (N,) integers, needed to balance.
        balance: "none", or how `quotas` divides the count among classes; the rule then applies to each class.
        recalls: (C,) recall of each class on validation data, in [0, 1], for the balance "drop".
        rng: the generator of "strata"; the other rules draw nothing.
        num_strata: S, for "strata".
        drop_bottom, drop_top: shares of all N in [0, 1), rounded down, of the lowest and the highest scores, which are
            never kept, whatever their class.
        reweigh: for "strata", weigh by the stratum's size over the number drawn from it, so that weighted sums are
            unbiased; otherwise all weights are 1.

    Raises:
        DataError: a NaN score, or scores that have no strata.
        ConfigError: a setting out of range or unknown, missing labels or generator, or strata with no sample to weigh.

    >>> choose(np.array([0.3, 0.9, 0.1, 0.9]), 2).ids.tolist(), choose(np.array([5, 5, 5]), 2, "bottom").ids.tolist()
    ([1, 3], [0, 1])
    """
    _check_options(rule, balance, labels, reweigh)
    _check_scores(scores, labels)
    check_share("drop_bottom", drop_bottom)
    check_share("drop_top", drop_top)
    num_lowest = num_pruned(drop_bottom, scores.size)
    num_candidates = scores.size - num_lowest - num_pruned(drop_top, scores.size)
    _check_count(count, num_candidates, scores.size)
    candidates = _block(np.argsort(scores, kind="stable"), scores, num_lowest, num_candidates)
    groups = _groups(candidates, count, labels, balance, recalls)
    if rule == "strata":
        draw = _strata_generator(rng, scores, num_strata)
        parts = [draw_strata(rows, scores[rows], quota, num_strata, draw, reweigh=reweigh) for rows, quota in groups]
        ids, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    else:
        ids, weights = np.concatenate([_by_rank(rows, scores, quota, rule) for rows, quota in groups]), None
    return Selection.of_ids(
        ids,
        scores.size,
        weights=weights if reweigh else None,
        requested=1.0 - count / scores.size,
        expected_drops=scores.size - count,
    )


def _check_options(rule: str, balance: str, labels: NDArray[Any] | None, reweigh: bool) -> None:
    for name, value, valid in (("rule", rule, get_args(Rule)), ("balance", balance, get_args(Balance))):
        if value not in valid:
            raise ConfigError(f"{name} {value!r} is unknown: {closest(str(value), valid)}")
    if balance != "none" and labels is None:
        raise ConfigError(f"balance {balance!r} needs labels: give labels=, or use 'none'")
    if reweigh and rule != "strata":
        raise ConfigError(f"reweigh goes with the rule 'strata', not {rule!r}: leave it out, or use 'strata'")


def _check_scores(scores: NDArray[Any], labels: NDArray[Any] | None) -> None:
    if scores.ndim != 1 or scores.dtype.kind not in "biuf":
        raise ConfigError(f"scores must be a 1-d array of numbers, got {scores.dtype} of shape {scores.shape}")
    if scores.dtype.kind == "f" and (missing := np.flatnonzero(np.isnan(scores))).size:
        raise DataError(
            f"{missing.size} of {scores.size} scores are NaN, first ids {missing[:5].tolist()}: leave them out"
        )
    if labels is not None and (labels.shape != scores.shape or labels.dtype.kind not in "iu"):
        raise ConfigError(f"labels must be {scores.size} integers, got {labels.dtype} of shape {labels.shape}")


def _check_count(count: int, num_candidates: int, num_samples: int) -> None:
    if num_candidates < 1:
        raise ConfigError("drop_bottom and drop_top together leave no sample to choose from: lower them")
    if not 1 <= count <= num_candidates:
        num_dropped = num_samples - num_candidates
        after = f" after {num_dropped} are dropped" if num_dropped else ""
        raise ConfigError(f"count {count} is outside 1..{num_candidates}, the number of samples to choose from{after}")


def _strata_generator(rng: np.random.Generator | None, scores: NDArray[Any], num_strata: int) -> np.random.Generator:
    if rng is None:
        raise ConfigError("the rule 'strata' draws at random: give rng")
    if num_strata < 1:
        raise ConfigError(f"num_strata {num_strata} must be at least 1")
    if infinite := np.count_nonzero(~np.isfinite(scores)):
        raise DataError(
            f"{infinite} of {scores.size} scores are infinite: use the rule top, as strata need a finite range"
        )
    return rng


def _groups(
    candidates: Ids,
    count: int,
    labels: NDArray[np.integer[Any]] | None,
    balance: Balance,
    recalls: NDArray[np.floating[Any]] | None,
) -> list[tuple[Ids, int]]:
    """Return (rows, quota) of all samples, or of each class; rows sorted as the candidates are."""
    if balance == "none" or labels is None:
        return [(candidates, count)]
    present, classes = np.unique(labels[candidates], return_inverse=True)
    sizes = np.bincount(classes)
    # Few classes fit in one or two bytes, which NumPy sorts in linear time.
    order = np.argsort(classes.astype(np.min_scalar_type(sizes.size - 1)), kind="stable")
    by_class = np.split(candidates[order], np.cumsum(sizes)[:-1])
    if balance == "drop":
        if recalls is None or recalls.size <= present[-1]:
            raise ConfigError(
                "balance 'drop' needs the recall of each class on validation data, which the scoring run of rayprune "
                "train measures: use it there, with a validation split"
            )
        return list(zip(by_class, drop_quotas(sizes, recalls[present], count).tolist(), strict=True))
    return list(zip(by_class, quotas(sizes, count, balance).tolist(), strict=True))


def _by_rank(rows: Ids, scores: NDArray[Any], count: int, rule: Rule) -> Ids:
    """Return `count` of rows that are sorted by (score, id): the first, the last or the middle ones."""
    start = {"bottom": 0, "middle": (rows.size - count) // 2, "top": rows.size - count}[rule]
    return _block(rows, scores, start, count)


def _block(rows: Ids, scores: NDArray[Any], start: int, count: int) -> Ids:
    """Return `count` of rows sorted by (score, id) from `start` on, with the lower ids of the lowest score."""
    stop = start + count
    if not 0 < start < stop:
        return rows[start:stop]
    values = scores[rows]
    first, last = (int(np.searchsorted(values, values[start], side)) for side in ("left", "right"))
    tied = min(last, stop) - start
    return np.concatenate([rows[first : first + tied], rows[start + tied : stop]])


def choose_by_boundary(distances: NDArray[np.float32], count: int) -> Selection:
    """Choose `count` samples near every class's boundary (BASE, Emam et al. 2021, arXiv 2111.12880).

    Args:
        distances: (N, C) from each sample to the boundary of each class.
        count: M, in [1, N].

    Returns:
        A Selection in which each class in turn takes its even share of the remaining samples, nearest first.

    >>> choose_by_boundary(np.array([[0.1, 0.9], [0.2, 0.3], [0.8, 0.7]]), 2).ids.tolist()
    [0, 1]
    """
    num_samples, num_classes = distances.shape
    remaining = np.ones(num_samples, dtype=bool)
    for label, quota in enumerate(quotas(np.full(num_classes, num_samples), count, "even").tolist()):
        ids = np.flatnonzero(remaining)
        remaining[ids[np.argsort(distances[ids, label], kind="stable")[:quota]]] = False
    return Selection.of_mask(~remaining, 1.0 - count / num_samples, num_samples - count)


def num_pruned(prune_ratio: float, num_samples: int) -> int:
    """Return floor(r·N), robust to products such as 0.29 × 100 = 28.999….

    >>> num_pruned(0.5, 5), num_pruned(0.29, 100)
    (2, 29)
    """
    # The product of two rounded numbers has a relative error of about 2e-16: an absolute one above 1e-9 from N = 10^8.
    return int(np.floor(prune_ratio * num_samples * (1 + 1e-15) + 1e-9))


def num_kept(keep: float, num_samples: int) -> int:
    """Return how many samples `keep` means.

    Args:
        keep: a float is a share in (0, 1]: N − floor((1 − keep)·N) samples, which agrees with a prune ratio of
            1 − keep; an int is the number itself, in [1, N].
        num_samples: N.

    Raises:
        ConfigError: `keep` is not a number, or out of range.

    >>> num_kept(0.29, 100), num_kept(0.5, 5), num_kept(1, 5), num_kept(1.0, 5)
    (29, 3, 1, 5)
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float | np.integer | np.floating):
        raise ConfigError(
            f"keep {short_repr(keep)} is not a number: give a share such as 0.3 or a number of samples such as 1000"
        )
    if isinstance(keep, int | np.integer):
        if not 1 <= keep <= num_samples:
            raise ConfigError(
                f"keep {keep} is outside 1..{num_samples}, the number of samples: give a number in that range, "
                "or a share such as 0.3"
            )
        return int(keep)
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"keep {keep!r} is a share outside (0, 1]: give a share such as 0.3, or a whole number")
    # A share close to 0 still keeps one sample.
    return max(num_samples - num_pruned(1.0 - float(keep), num_samples), min(num_samples, 1))


def quotas(sizes: NDArray[np.integer[Any]], count: int, balance: Balance) -> NDArray[np.int64]:
    """Divide a count among classes.

    Args:
        sizes: (C,) integers, the number of samples of each class.
        count: the number to keep in total, in [0, sum of sizes].
        balance: "proportional" keeps the same share of every class, rounded down; the largest remainders get one more,
            lower classes first. "even" keeps the same number of every class; classes with room make up evenly for
            classes that are too small, lower classes first.

    Returns:
        (C,) int64, at most the sizes, with sum `count`.

    Raises:
        ConfigError: the count is out of range, or another balance.

    >>> quotas(np.array([5, 3]), 4, "proportional").tolist(), quotas(np.array([5, 3]), 5, "even").tolist()
    ([3, 1], [3, 2])
    >>> quotas(np.array([1, 9, 9]), 8, "even").tolist()
    [1, 4, 3]
    """
    if balance not in ("proportional", "even"):
        raise ConfigError(f"balance {balance!r} sets no quotas: {closest(str(balance), ('proportional', 'even'))}")
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if not 0 <= count <= total:
        raise ConfigError(f"count {count} is outside 0..{total}, the number of samples in all classes")
    if balance == "proportional":
        # In integers: count·size is exact below 2^63, so for three billion samples.
        quota, remainder = np.divmod(count * sizes, max(total, 1))
        order = np.argsort(-remainder, kind="stable")
    else:
        level = bisect_right(range(int(sizes.max(initial=0)) + 1), count, key=lambda n: int(np.minimum(sizes, n).sum()))
        quota = np.minimum(sizes, level - 1)
        order = np.flatnonzero(sizes > quota)
    quota[order[: count - int(quota.sum())]] += 1
    return quota


def drop_quotas(sizes: NDArray[np.integer[Any]], recalls: NDArray[np.floating[Any]], count: int) -> NDArray[np.int64]:
    """Divide a count among classes as DRoP does: more of those that are recognized less often.

    Vysogorets, Ahuja, Kempe, "DRoP: Distributionally Robust Data Pruning", ICLR 2025, arXiv 2404.05579: quotas in
    proportion to N_k·(1 − recall_k); a class that is too small is kept whole, and the others share the rest. Ours: the
    quotas are whole numbers with an exact sum, and classes of recall 1 share what the others cannot take by size.

    Args:
        sizes: (C,) N_k.
        recalls: (C,) in [0, 1].
        count: the number to keep in total, in [0, sum of sizes].

    Returns:
        (C,) int64, at most the sizes, with sum `count`.

    >>> drop_quotas(np.array([50, 100, 200]), np.array([0.5, 0.8, 0.9]), 140).tolist()
    [50, 45, 45]
    """
    if not np.isfinite(recalls).all() or recalls.min(initial=0.0) < 0.0 or recalls.max(initial=0.0) > 1.0:
        raise ConfigError(f"recalls {np.asarray(recalls).tolist()} are not shares in [0, 1]")
    return capped_quotas(sizes, sizes * (1.0 - recalls), count)


def capped_quotas(sizes: NDArray[np.integer[Any]], shares: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Divide a count among classes in proportion to shares; classes that are too small are kept whole.

    The other classes divide what is left, again in proportion. Classes of share 0 divide by size what the others cannot
    take. The largest remainders get one more, lower classes first.

    Args:
        sizes: (C,) integers, the number of samples of each class.
        shares: (C,) finite, at least 0; only their proportions matter.
        count: the number to keep in total, in [0, sum of sizes].

    Returns:
        (C,) int64, at most the sizes, with sum `count`.

    >>> capped_quotas(np.array([10, 100, 100]), np.array([2.0, 1.0, 1.0]), 60).tolist()
    [10, 25, 25]
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if not 0 <= count <= sizes.sum():
        raise ConfigError(f"count {count} is outside 0..{sizes.sum()}, the number of samples in all classes")
    quota = np.zeros(sizes.size, dtype=np.float64)
    for by in (shares, sizes.astype(np.float64)):
        while (rest := count - quota.sum()) > 1e-9 and (free := (quota < sizes) & (by > 0.0)).any():
            quota[free] += rest * by[free] / by[free].sum()
            over = quota >= sizes
            if not (over & free).any():
                break
            # Start again with the classes that are too small kept whole.
            quota = np.where(over, sizes, 0.0)
    whole = np.floor(quota + 1e-9).astype(np.int64)
    order = np.argsort(np.where(whole < sizes, whole - quota, np.inf), kind="stable")
    whole[order[: count - int(whole.sum())]] += 1
    return whole


def draw_strata(
    rows: Ids, values: NDArray[Any], count: int, num_strata: int, rng: np.random.Generator, *, reweigh: bool
) -> tuple[Ids, NDArray[np.float64]]:
    """Draw rows from every part of the range of their values.

    Args:
        rows: (R,) ids, in ascending order of their values.
        values: (R,) finite numbers, ascending.
        count: M, in [1, R].
        num_strata: S.
        rng: the generator of the draw.
        reweigh: refuse non-empty strata from which no sample is drawn.

    Returns:
        (M,) rows, and the size of each one's stratum over the number drawn from it, (M,) float64.

    Raises:
        ConfigError: a stratum that no weight can represent.
        DataError: values too far apart.
    """
    ends = _strata_ends(values.astype(np.float64), num_strata)
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    budgets = strata_budgets(sizes, count)
    if reweigh and (empty := np.count_nonzero((budgets == 0) & (sizes > 0))):
        raise ConfigError(
            f"{count} samples leave {empty} of {np.count_nonzero(sizes)} strata without one, which no weight makes up "
            "for: use fewer strata, keep more, or leave reweigh out"
        )
    picks = [
        start + (np.arange(size) if budget == size else rng.choice(size, budget, replace=False, shuffle=False))
        for start, size, budget in zip(starts, sizes, budgets, strict=True)
    ]
    weights = np.repeat(sizes / np.maximum(budgets, 1), budgets)
    return rows[np.concatenate(picks)], weights


def _strata_ends(values: NDArray[np.float64], num_strata: int) -> NDArray[np.int64]:
    """Return where each stratum of ascending values ends, (S,)."""
    low, high = values[0], values[-1] + 1e-4 * abs(values[-1])
    with np.errstate(over="ignore"):
        width = (high - low) / num_strata
    if not np.isfinite(width):
        raise DataError(f"scores from {low:g} to {high:g} are too far apart for strata: scale them down")
    # The last stratum has no upper edge, so that rounding of `high` cannot lose the maximum.
    inner = np.searchsorted(values, low + width * np.arange(1, num_strata), "left")
    return np.concatenate([inner, [values.size]]).astype(np.int64)


def strata_budgets(sizes: NDArray[np.integer[Any]], count: int) -> NDArray[np.int64]:
    """Return how many CCS draws from each stratum: min(size, rest // number of strata left), smallest stratum first.

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
