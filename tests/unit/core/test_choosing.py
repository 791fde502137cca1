"""Choosing by scores: exact counts, ties to the lower id, and quotas that add up.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core.choosing import capped_quotas, choose, drop_quotas, num_kept, num_pruned, quotas

RULES = ["top", "bottom", "middle", "strata"]
BALANCES = ["none", "proportional", "even"]
# Few distinct values, so that most scores are tied.
samples = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=40)


def arrays_of(pairs: list[tuple[int, int]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    scores, labels = np.array(pairs).T
    return scores.astype(np.float32), labels


@given(samples, st.sampled_from(RULES), st.sampled_from(BALANCES), st.data())
def test_the_count_is_exact_and_the_choice_reproducible(
    pairs: list[tuple[int, int]], rule: Any, balance: Any, data: st.DataObject
) -> None:
    scores, labels = arrays_of(pairs)
    drops = data.draw(st.sampled_from([(0.0, 0.0), (0.2, 0.0), (0.0, 0.3), (0.25, 0.25)]))
    num_candidates = scores.size - sum(num_pruned(share, scores.size) for share in drops)
    count = data.draw(st.integers(1, num_candidates))

    def select() -> Any:
        rng = np.random.default_rng(3)
        options = {"labels": labels, "balance": balance, "num_strata": 5, "drop_bottom": drops[0], "drop_top": drops[1]}
        return choose(scores, count, rule, rng=rng, **options)

    selection = select()
    assert selection.num_kept == count
    assert selection.requested == 1 - count / scores.size
    assert selection.expected_drops == scores.size - count
    assert np.array_equal(selection.codes, select().codes)
    assert set(selection.weights) == {1.0}


@given(samples, st.sampled_from(["top", "bottom", "middle"]), st.data())
def test_ties_go_to_the_lower_ids(pairs: list[tuple[int, int]], rule: Any, data: st.DataObject) -> None:
    scores, _ = arrays_of(pairs)
    share = data.draw(st.sampled_from([0.0, 0.2]))
    count = data.draw(st.integers(1, scores.size - 2 * num_pruned(share, scores.size)))
    kept = choose(scores, count, rule, drop_bottom=share, drop_top=share).codes != 0
    for value in np.unique(scores):
        mask = kept[scores == value]
        assert mask[: mask.sum()].all()
    # The kept scores are one contiguous part of the sorted scores.
    values, inside = np.sort(scores), np.sort(scores[kept])
    assert any(np.array_equal(inside, values[i : i + inside.size]) for i in range(values.size))


@given(samples, st.sampled_from(["proportional", "even"]), st.data())
def test_each_class_keeps_its_lowest_scores(pairs: list[tuple[int, int]], balance: Any, data: st.DataObject) -> None:
    scores, labels = arrays_of(pairs)
    count = data.draw(st.integers(1, scores.size))
    quota_C = quotas(np.bincount(labels), count, balance)
    ids = choose(scores, count, "bottom", labels=labels, balance=balance).ids
    assert np.bincount(labels[ids], minlength=quota_C.size).tolist() == quota_C.tolist()
    by_class = (sorted((scores[i], i) for i in np.flatnonzero(labels == c)) for c in range(quota_C.size))
    lowest = [i for own, quota in zip(by_class, quota_C, strict=True) for _, i in own[:quota]]
    assert sorted(lowest) == ids.tolist()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.sampled_from(["proportional", "even"]), st.data())
def test_quotas_add_up_and_fit(sizes: list[int], balance: Any, data: st.DataObject) -> None:
    size_C = np.array(sizes)
    count = data.draw(st.integers(0, sum(sizes)))
    quota_C = quotas(size_C, count, balance)
    assert quota_C.dtype == np.int64
    assert quota_C.sum() == count
    assert (quota_C >= 0).all()
    assert (quota_C <= size_C).all()
    if balance == "proportional":
        assert (np.abs(quota_C * max(sum(sizes), 1) - count * size_C) < max(sum(sizes), 1)).all()
    else:  # a class with room has at most one less than any other
        assert (quota_C[quota_C < size_C] >= quota_C.max() - 1).all()


def test_balances_by_hand() -> None:
    scores, labels = np.arange(1, 9) / 10, np.array([0] * 5 + [1] * 3)
    kept = {b: choose(scores, 5, "bottom", labels=labels, balance=b).ids.tolist() for b in BALANCES}  # type: ignore[arg-type]
    assert kept == {"none": [0, 1, 2, 3, 4], "proportional": [0, 1, 2, 5, 6], "even": [0, 1, 2, 5, 6]}
    assert choose(scores, 4, "bottom", labels=labels, balance="proportional").ids.tolist() == [0, 1, 2, 5]
    assert quotas(np.array([4, 4, 4]), 4, "proportional").tolist() == [2, 1, 1]
    assert quotas(np.array([1, 0, 7, 7]), 10, "even").tolist() == [1, 0, 5, 4]


def test_samples_dropped_first_are_shares_of_all_samples() -> None:
    scores = np.arange(10.0)
    assert choose(scores, 3, "bottom", drop_bottom=0.29).ids.tolist() == [2, 3, 4]
    assert choose(scores, 3, "top", drop_top=0.3).ids.tolist() == [4, 5, 6]
    assert choose(scores, 2, "middle", drop_bottom=0.4).ids.tolist() == [6, 7]
    with pytest.raises(ValueError, match=r"outside 1\.\.5.*after 5 are dropped"):
        choose(scores, 6, drop_bottom=0.3, drop_top=0.2)


@given(st.integers(1, 10**6), st.integers(1, 1000))
def test_a_keep_share_and_its_prune_ratio_add_up_to_all(num_samples: int, thousandths: int) -> None:
    kept = num_kept(thousandths / 1000, num_samples)
    assert kept == max(1, -(-thousandths * num_samples // 1000))
    assert num_pruned(thousandths / 1000, num_samples) == thousandths * num_samples // 1000


@pytest.mark.parametrize("keep", [0, -1, 6, 0.0, 1.5, -0.5, float("nan"), True, "half"])
def test_a_keep_out_of_range_is_refused(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"^keep .* (0\.3|whole)"):
        num_kept(keep, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "highest"}, "rule 'highest' is unknown"),
        ({"balance": "evn"}, "did you mean 'even'"),
        ({"balance": "even", "labels": None}, "needs labels"),
        ({"labels": np.zeros(3, dtype=int)}, "labels must be 4 integers"),
        ({"rule": "strata", "rng": None}, "give rng"),
        ({"rule": "strata", "num_strata": 0}, "num_strata 0"),
        ({"reweigh": True}, "goes with the rule 'strata'"),
        ({"drop_top": 1.5}, "drop_top 1.5"),
        ({"count": 0}, r"outside 1\.\.4"),
        ({"count": 5}, r"outside 1\.\.4"),
        ({"scores": np.array([1, np.nan, np.nan, 0])}, r"2 of 4 scores are NaN, first ids \[1, 2\]"),
        ({"scores": np.array([1, np.inf, 0, 0]), "rule": "strata"}, "1 of 4 scores are infinite"),
        ({"scores": np.array([1e308, -1e308, 0, 0]), "rule": "strata"}, "too far apart"),
        ({"scores": np.array(["a", "b"])}, "must be a 1-d array of numbers"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    valid = {"scores": np.arange(4.0), "count": 2, "labels": np.zeros(4, dtype=int), "rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match=message):
        choose(**(valid | options))


def test_reweighed_strata_are_unbiased() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.gamma(2.0, size=200), rng.integers(0, 2, 200)
    values = rng.normal(size=200) + scores
    for balance in ("none", "proportional"):
        options: Any = {"labels": labels, "balance": balance, "num_strata": 4, "reweigh": True}
        draws = [choose(scores, 40, "strata", rng=rng, **options) for _ in range(2000)]
        sums = np.array([np.sum(draw.weights * values[draw.ids]) for draw in draws])
        assert abs(sums.mean() - values.sum()) < 4 * sums.std() / np.sqrt(sums.size)
        np.testing.assert_allclose([draw.weights.sum() for draw in draws], 200, rtol=1e-5)


def test_reweighing_refuses_strata_without_a_kept_sample() -> None:
    scores, rng = np.arange(100.0), np.random.default_rng(0)
    with pytest.raises(ValueError, match="use fewer strata"):
        choose(scores, 30, "strata", rng=rng, reweigh=True)
    assert choose(scores, 30, "strata", rng=rng).num_kept == 30
    labels = np.array([0] * 99 + [1])
    with pytest.raises(ValueError, match="1 of 1 strata"):
        choose(scores, 30, "strata", labels=labels, balance="proportional", num_strata=2, rng=rng, reweigh=True)


def test_ids_beyond_float32_are_exact() -> None:
    scores = np.zeros((1 << 24) + 4, dtype=np.float16)
    scores[[(1 << 24) + 1, (1 << 24) + 3]] = 1
    assert choose(scores, 2).ids.tolist() == [(1 << 24) + 1, (1 << 24) + 3]


def test_drop_gives_more_to_classes_that_are_recognized_less_often() -> None:
    """The numbers of the paper's rule: quotas in proportion to N_k·(1 − recall_k), full classes kept whole."""
    hundred = np.array([100, 100, 100])
    recalls = np.array([0.9, 0.8, 0.5])
    assert drop_quotas(hundred * 160, recalls, 24_000).tolist() == [3_000, 6_000, 15_000]
    assert (drop_quotas(hundred * 600, recalls, 108_000) / 60_000).tolist() == pytest.approx(
        [0.266667, 0.533333, 1.0], abs=1e-4
    )
    assert drop_quotas(np.array([50, 100, 200]), np.array([0.5, 0.8, 0.9]), 140).tolist() == [50, 45, 45]
    assert drop_quotas(hundred, np.ones(3), 150).tolist() == [50, 50, 50]
    assert drop_quotas(hundred, np.array([1.0, 1.0, 0.0]), 150).tolist() == [25, 25, 100]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 0.3, 0.9, 1.0])), min_size=1, max_size=8), st.data()
)
def test_drop_quotas_add_up_and_fit(classes: list[tuple[int, float]], data: st.DataObject) -> None:
    sizes, recalls = np.array([size for size, _ in classes]), np.array([recall for _, recall in classes])
    count = data.draw(st.integers(0, int(sizes.sum())))
    quota = drop_quotas(sizes, recalls, count)
    assert quota.sum() == count
    assert (quota >= 0).all()
    assert (quota <= sizes).all()
    # A class of zero recall never gets a smaller share than one of the same size that is recognized better.
    for low in range(len(classes)):
        for high in range(len(classes)):
            if sizes[low] == sizes[high] and recalls[low] < recalls[high]:
                assert quota[low] >= quota[high] - 1


def test_the_balance_drop_needs_the_recalls() -> None:
    scores, labels = np.arange(6.0), np.array([0, 0, 0, 2, 2, 2])
    chosen = choose(scores, 3, labels=labels, balance="drop", recalls=np.array([0.5, np.nan, 1.0])[[0, 0, 2]])
    assert chosen.ids.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="balance 'drop' needs the recall of each class"):
        choose(scores, 3, labels=labels, balance="drop")
    with pytest.raises(ValueError, match=r"recalls .* are not shares in \[0, 1\]"):
        drop_quotas(np.array([3]), np.array([1.5]), 1)


def test_capped_quotas_are_proportional_and_never_above_the_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 30, 6)
        shares = rng.exponential(size=6) * (rng.random(6) < 0.8)
        count = int(rng.integers(0, sizes.sum() + 1))
        quota = capped_quotas(sizes, shares, count)
        assert quota.sum() == count
        assert (quota <= sizes).all()
        free = (quota < sizes) & (shares > 0)
        if free.any():  # classes with room are within rounding of one common ratio, and nobody full is above it
            ratio = quota[free] / shares[free]
            assert (ratio.max() - ratio.min()) <= (2.0 / shares[free]).max() + 1e-9
            assert (quota[shares == 0] == 0).all()
