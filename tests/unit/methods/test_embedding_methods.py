"""The static methods on embeddings: examples by hand, naive transcriptions, golden arrays, options and mistakes.

tests/golden/deepcore_geometry.npz and moderate_distance.npz hold what the programs published with DeepCore (arXiv
2204.08499) and Moderate (ICLR 2023) choose of synthetic features, and two outputs that are wrong.

Shapes: N samples, d numbers of an embedding.
"""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune import D2, SSP, Herding, InfoMax, KCenter, Moderate, Selector, SemDeDup, build_method
from rayprune.core.method import Method
from rayprune.testing import SyntheticRun
from tests.support.paths import GOLDEN

NAMES = ("d2", "herding", "infomax", "k_center", "moderate", "semdedup", "ssp")


def golden(name: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def scored(
    method: Method,
    embeddings: Any,
    labels: Any = None,
    signals: dict[str, Any] | None = None,
    swept: dict[str, Any] | None = None,
    *,
    seed: int = 0,
) -> Selector:
    """Return a Selector after the method's scoring epochs, with the same signals in each, in epoch T."""
    vectors = np.asarray(embeddings, dtype=np.float32)
    num, last = len(vectors), method.collect_epochs - 1
    selector = Selector(method, num, last + 3, seed, None if labels is None else np.asarray(labels))
    constant = {"loss": np.ones(num), "margin": np.zeros(num), "el2n": np.ones(num)}
    for epoch in range(last + 1):
        selector.begin_epoch(epoch)
        selector.observe(np.arange(num), constant | (signals or {}), epoch)
    selector.observe(np.arange(num), {**constant, "embedding": vectors, **(swept or {})}, last, sweep=True)
    selector.begin_epoch(last + 1)
    return selector


def kept(method: Method, *args: Any, **options: Any) -> list[int]:
    selector = scored(method, *args, **options)
    ids: list[int] = selector.begin_epoch(selector.epoch).ids.tolist()
    return ids


def once(cls: Any, **options: Any) -> Any:
    return cls(score_epochs=1, **options)


# Golden arrays.


def test_herding_equals_the_textbook_and_not_the_argmax() -> None:
    stored = golden("deepcore_geometry")
    selector = scored(once(Herding, prune_ratio=50 / 60), stored["X"])
    priority = selector.scores()["herding_priority"]
    order = np.argsort(-priority)[:10]
    assert order.tolist() == stored["herding_argmin_order"].tolist()
    assert np.isnan(priority).sum() == 50
    assert np.nanmin(priority) == 1
    assert sorted(order.tolist()) != stored["herding_deepcore_argmax"].tolist()
    # The argmax keeps outliers, whose mean is far off.
    mean = stored["X"].mean(axis=0)
    errors = [
        np.linalg.norm(stored["X"][ids].mean(axis=0) - mean) for ids in (order, stored["herding_deepcore_argmax"])
    ]
    assert errors[0] < 0.1 * errors[1]


def test_k_center_equals_the_reference_from_the_same_start() -> None:
    from rayprune.core.algorithms.geometry import Points
    from rayprune.core.algorithms.greedy import farthest_first

    stored = golden("deepcore_geometry")
    order, _ = farthest_first(Points(stored["X"]), 11, start=3)
    assert order[0] == 3
    assert sorted(order.tolist()) == stored["kcenter_start3"].tolist()
    # By default the start is the sample nearest the mean.
    start = int(np.linalg.norm(stored["X"] - stored["X"].mean(axis=0), axis=1).argmin())
    expected, _ = farthest_first(Points(stored["X"]), 10, start=start)
    assert kept(once(KCenter, prune_ratio=50 / 60), stored["X"]) == sorted(expected.tolist())


def test_moderate_equals_the_reference_and_not_the_port_that_keeps_the_extremes() -> None:
    stored = golden("moderate_distance")
    selector = scored(once(Moderate, prune_ratio=0.8), stored["features"], stored["labels"])
    assert selector.scores()["class_distance"] == pytest.approx(stored["distance"], abs=1e-6)
    ids = selector.begin_epoch(1).ids.tolist()
    assert ids == stored["kept_middle_global"].tolist()
    assert ids != stored["kept_by_d2_port"].tolist()


# Examples by hand.


def test_moderate_by_hand_with_both_centers() -> None:
    # Class 0: 0 1 2 9, median 1.5, mean 3; class 2: 5 alone.
    vectors, labels = [[0.0], [1.0], [5.0], [2.0], [9.0]], [0, 0, 2, 0, 0]
    median = scored(once(Moderate, prune_ratio=0.5), vectors, labels)
    assert median.scores()["class_distance"].tolist() == [1.5, 0.5, 0.0, 0.5, 7.5]
    # Sorted 0 0.5 0.5 1.5 7.5: the middle three.
    assert median.begin_epoch(1).ids.tolist() == [0, 1, 3]
    mean = scored(once(Moderate, prune_ratio=0.5, center="mean"), vectors, labels)
    assert mean.scores()["class_distance"].tolist() == [3.0, 2.0, 0.0, 1.0, 6.0]


def test_ssp_by_hand() -> None:
    # One cluster around 0° and one around 90°, each with a sample off its center.
    angles = np.radians([0, 0, 0, 0, 3, 90, 90, 90, 90, 82])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 11)[:, None]
    selector = scored(once(SSP, prune_ratio=0.8, clusters=2), vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    centers = np.stack([unit[:5].mean(axis=0), unit[5:].mean(axis=0)])
    cosines = unit @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T
    assert selector.scores()["ssp"] == pytest.approx(1 - cosines.max(axis=1), abs=1e-6)
    assert selector.begin_epoch(1).ids.tolist() == [4, 9]
    assert kept(once(SSP, prune_ratio=0.8, clusters=2, rule="bottom"), vectors) == [0, 1]


def test_ssp_keeps_a_share_of_every_class() -> None:
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(60, 4)), np.repeat([0, 1, 3], [40, 16, 4])
    vectors[:40] *= [1, 0.05, 0.05, 0.05]  # class 0 is near its centers
    plain = scored(once(SSP, prune_ratio=0.7), vectors, labels)
    share = scored(once(SSP, prune_ratio=0.7, class_share=0.5), vectors, labels)
    assert np.array_equal(plain.scores()["ssp"], share.scores()["ssp"])
    counts = [np.bincount(labels[selector.begin_epoch(1).ids], minlength=4) for selector in (plain, share)]
    assert counts[0][0] < 6  # half of the 12 that proportional pruning keeps
    assert counts[1][0] == 6
    assert counts[1].sum() == 18
    best = np.argsort(-share.scores()["ssp"][:40], kind="stable")[:6]
    assert share.begin_epoch(1).ids[:6].tolist() == sorted(best.tolist())
    whole = np.bincount(labels[kept(once(SSP, prune_ratio=0.75, class_share=1.0), vectors, labels)])
    assert whole.tolist() == [10, 4, 0, 1]


def test_ssp_keeps_a_share_of_every_class_by_the_average_of_several_runs() -> None:
    rng = np.random.default_rng(0)
    labels, method = np.repeat([0, 1], 20), once(SSP, prune_ratio=0.7, class_share=0.5)
    one, other = (scored(method, rng.normal(size=(40, 4)), labels) for _ in range(2))
    both = Selector(method, 40, 3, 0, labels, averaged=other.scores())
    both.table.load_arrays(one.table.to_arrays())
    ids = [selector.begin_epoch(1).ids.tolist() for selector in (one, other, both)]
    assert ids[0] != ids[1] == ids[2]


def test_semdedup_by_hand() -> None:
    angles = np.radians([0, 10, 20, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # The cluster's center is at about 26°: from far to near 90, 0, 10, 20.
    selector = scored(once(SemDeDup, prune_ratio=0.25, clusters=1), vectors)
    expected = [0.0, np.cos(np.radians(10)), np.cos(np.radians(10)), 0.0]
    assert selector.scores()["semdedup"] == pytest.approx(expected, abs=1e-6)
    # 1 and 2 are tied. Among kept samples alone, 2 would be 20° from 0 and 1 the only one to go.
    assert selector.begin_epoch(1).ids.tolist() == [0, 1, 3]
    assert kept(once(SemDeDup, prune_ratio=0.5, clusters=1), vectors) == [0, 3]
    # From near to far 20, 10, 0, 90.
    easy = scored(once(SemDeDup, prune_ratio=0.5, clusters=1, first="easy"), vectors)
    expected = [np.cos(np.radians(10)), np.cos(np.radians(10)), 0.0, np.cos(np.radians(70))]
    assert easy.scores()["semdedup"] == pytest.approx(expected, abs=1e-6)


def test_semdedup_keeps_one_of_each_group_of_equal_samples() -> None:
    rng = np.random.default_rng(1)
    originals = rng.normal(size=(50, 8))
    owner = rng.permutation(np.repeat(np.arange(50), 4))
    vectors = originals[owner] * rng.uniform(0.5, 2, size=(200, 1))
    for options in ({}, {"first": "easy"}, {"first": "random"}, {"storage": "float32", "clusters": 3}):
        ids = kept(once(SemDeDup, prune_ratio=0.75, **options), vectors)
        assert sorted(owner[ids].tolist()) == list(range(50)), options


def test_d2_by_hand() -> None:
    vectors, difficulty = [[0.0], [0.1], [1.0], [3.0]], [1.0, 0.9, 0.5, 0.2]
    options = {"difficulty": "el2n", "neighbors": 1, "gamma": 1.0}
    selector = scored(once(D2, prune_ratio=0.25, **options), vectors, swept={"el2n": np.array(difficulty)})
    assert selector.begin_epoch(1).ids.tolist() == [0, 2, 3]
    assert selector.scores()["d2_priority"].tolist()[::2] == [3, 2]
    # Without messages, the most difficult are kept.
    hardest = kept(once(D2, prune_ratio=0.25, difficulty="el2n", neighbors=0), vectors, swept={"el2n": difficulty})
    assert hardest == [0, 1, 2]


def test_infomax_by_hand() -> None:
    # The cosine of 0 and 1 is 0.9, and 2 is orthogonal to both.
    vectors = [[1.0, 0.0, 0.0], [0.9, np.sqrt(1 - 0.81), 0.0], [0.0, 0.0, 1.0]]
    for alpha, ids in ((0.0, [0, 1]), (0.2, [0, 1]), (0.3, [0, 2])):
        method = once(InfoMax, prune_ratio=0.34, neighbors=1, alpha=alpha)
        assert kept(method, vectors, swept={"el2n": [1.0, 0.9, 0.5]}) == ids
        # Another scale of the score is the same score.
        assert kept(method, vectors, swept={"el2n": [10.0, 9.0, 5.0]}) == ids


# Naive transcriptions.


def naive_d2(vectors: Any, difficulty: Any, count: int, neighbors: int, gamma: float) -> list[int]:
    distances = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    np.fill_diagonal(distances, np.inf)
    near = np.argsort(distances.astype(np.float32), axis=1, kind="stable")[:, :neighbors]
    values = [s + sum(np.exp(-distances[i, j]) * difficulty[j] for j in near[i]) for i, s in enumerate(difficulty)]
    order: list[int] = []
    while len(order) < count:
        best = max((i for i in range(len(values)) if i not in order), key=lambda i: (values[i], -i))
        for j in near[best]:
            values[j] -= np.exp(-gamma * distances[best, j]) * values[best]
        order.append(best)
    return order


@pytest.mark.parametrize(("neighbors", "gamma"), [(1, 1.0), (3, 0.1), (50, 0.5)])
def test_d2_equals_a_naive_transcription(neighbors: int, gamma: float) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        vectors, margin = rng.normal(size=(40, 3)).astype(np.float32), rng.uniform(-1, 1, (3, 40)).astype(np.float32)
        method = D2(prune_ratio=0.6, score_epochs=3, neighbors=neighbors, gamma=gamma)
        selector = Selector(method, 40, 6)
        for epoch in range(3):
            selector.begin_epoch(epoch)
            for _ in range(2):  # a repeated observation counts once
                selector.observe(np.arange(40), {"margin": margin[epoch]}, epoch)
        selector.observe(np.arange(40), {"embedding": vectors}, 2, sweep=True)
        ids = selector.begin_epoch(3).ids
        aum = margin.astype(np.float64).mean(axis=0)
        expected = naive_d2(vectors.astype(np.float64), aum.max() - aum, 16, min(neighbors, 39), gamma)
        priority = selector.scores()["d2_priority"]
        assert ids[np.argsort(-priority[ids])].tolist() == expected


def test_d2_drops_the_hardest_and_balances() -> None:
    rng = np.random.default_rng(3)
    vectors, el2n, labels = rng.normal(size=(50, 2)), rng.random(50), rng.integers(0, 3, 50)
    options: dict[str, Any] = {"prune_ratio": 0.6, "difficulty": "el2n"}
    ids = kept(once(D2, **options, drop_hardest=0.3), vectors, swept={"el2n": el2n})
    assert len(ids) == 20
    assert not np.isin(np.argsort(el2n)[-15:], ids).any()
    even = kept(once(D2, **options, balance="even"), vectors, labels, swept={"el2n": el2n})
    assert sorted(np.bincount(labels[even]).tolist()) == [6, 7, 7]
    # Each class is by itself.
    own = np.flatnonzero(labels == 1)
    count = int((labels[even] == 1).sum())
    values = el2n.astype(np.float32).astype(np.float64)[own]
    expected = naive_d2(vectors[own].astype(np.float32).astype(np.float64), values, count, 5, 0.1)
    assert sorted(own[expected].tolist()) == [i for i in even if labels[i] == 1]


def test_d2_names_samples_without_a_margin() -> None:
    selector = Selector(D2(score_epochs=1), 6, 3)
    selector.begin_epoch(0)
    selector.observe(np.arange(5), {"margin": np.array([0.1, 0.2, np.nan, 0.3, 0.4])}, 0)
    selector.observe(np.arange(6), {"embedding": np.eye(6)}, 0, sweep=True)
    with pytest.raises(ValueError, match=r"2 samples \(ids \[2, 5\]\) have no margin: every sample must be visited"):
        selector.begin_epoch(1)


def pair_matrix(vectors: NDArray[Any], neighbors: int) -> NDArray[np.float64]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    near = np.argsort(-cosines, axis=1)[:, :neighbors]
    joined = np.zeros_like(cosines, dtype=bool)
    np.put_along_axis(joined, near, True, axis=1)
    return np.where(joined | joined.T, np.maximum(cosines, 0), 0)


def test_infomax_is_near_the_best_choice_and_above_the_softmax() -> None:
    ours, relaxed = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        vectors, scores, count, alpha = rng.normal(size=(11, 3)), rng.random(11), int(rng.integers(2, 8)), 0.3
        if seed % 2:  # near-duplicates
            vectors[6:] = vectors[:5] + 0.01 * rng.normal(size=(5, 3))
            scores[6:] = scores[:5]
        similar, scores = pair_matrix(vectors, 3), scores / scores.max()

        def value(ids: Any, scores: Any = scores, similar: Any = similar, alpha: float = alpha) -> float:
            ids = list(ids)
            return float(scores[ids].sum() - alpha * similar[np.ix_(ids, ids)].sum())

        values = [value(ids) for ids in combinations(range(11), count)]
        low, high = min(values), max(values)
        method = once(InfoMax, prune_ratio=1 - count / 11, neighbors=3, alpha=alpha)
        ids = kept(method, vectors, swept={"el2n": scores})
        assert len(ids) == count
        ours.append((value(ids) - low) / (high - low))
        x = np.full(11, count / 11)
        for _ in range(20):
            powers = np.exp(scores - 2 * alpha * similar @ x)
            x = count * powers / powers.sum()
        best = np.argsort(-(scores - 2 * alpha * similar @ x), kind="stable")[:count]
        relaxed.append((value(best) - low) / (high - low))
    assert min(ours) > 0.85
    assert np.mean(ours) > 0.98 > 0.95 > np.mean(relaxed)


def test_k_center_covers_better_than_a_draw_and_within_its_bound_in_parts() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(300, 3)).astype(np.float32)

    def radius(ids: Any) -> float:
        return float(np.linalg.norm(vectors[:, None] - vectors[ids], axis=2).min(axis=1).max())

    whole = radius(kept(once(KCenter, prune_ratio=0.8), vectors))
    parts = radius(kept(once(KCenter, prune_ratio=0.8, parts=3), vectors))
    share = radius(kept(once(KCenter, prune_ratio=1 - 20 / 300), vectors))
    drawn = np.mean([radius(rng.permutation(300)[:60]) for _ in range(20)])
    assert whole < parts < drawn
    # The radius of 20 samples by farthest-first traversal is at least the best one of 20.
    assert parts <= 2 * share


@pytest.mark.parametrize("name", ["herding", "k_center"])
def test_each_class_is_by_itself(name: str) -> None:
    rng = np.random.default_rng(4)
    vectors, labels = rng.normal(size=(60, 3)).astype(np.float32), rng.integers(0, 4, 60)
    vectors[labels == 2] += 5
    ids = kept(
        build_method({"name": name, "prune_ratio": 0.5, "score_epochs": 1, "balance": "proportional"}), vectors, labels
    )
    for label in range(4):
        own = np.flatnonzero(labels == label)
        count = int((labels[ids] == label).sum())
        assert count == pytest.approx(own.size / 2, abs=1)
        alone = build_method({"name": name, "prune_ratio": 1 - count / own.size, "score_epochs": 1})
        assert own[kept(alone, vectors[own])].tolist() == [i for i in ids if labels[i] == label]


# All of them.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_equal_samples_large_numbers_and_zeros_work(name: str, storage: str) -> None:
    largest = 6e4 if storage == "float16" else 3e38
    labels = np.arange(20) % 3
    for vectors in (np.ones((20, 4)), np.zeros((20, 4)), np.full((20, 2), largest), np.eye(20)[:, :5] * largest):
        method = build_method({"name": name, "prune_ratio": 0.55, "score_epochs": 1, "storage": storage})
        selector = scored(method, vectors, labels)
        assert selector.begin_epoch(1).num_kept == 9
        assert all(np.isfinite(column[~np.isnan(column)]).all() for column in selector.scores().values())


@pytest.mark.parametrize("name", NAMES)
def test_equal_samples_keep_the_lower_ids(name: str) -> None:
    method = build_method({"name": name, "prune_ratio": 0.5, "score_epochs": 1})
    ids = kept(method, np.ones((12, 3)), np.zeros(12, dtype=int))
    if name == "semdedup":  # the first of the only cluster is kept, the others are tied
        assert ids == list(range(6))
    elif name in ("d2", "infomax"):  # each has neighbors with lower ids, whose values fall when it is kept
        assert ids[0] == 0
        assert len(ids) == 6
    else:
        assert ids == list(range(6))


@pytest.mark.parametrize("name", NAMES)
def test_condensing_is_pure_and_repeats(name: str) -> None:
    rng = np.random.default_rng(7)
    vectors, labels = rng.normal(size=(90, 5)).astype(np.float32), rng.integers(0, 4, 90)
    config = {"name": name, "prune_ratio": 0.7, "score_epochs": 2}
    if name in ("d2", "herding", "infomax", "k_center"):
        config |= {"parts": 3, "balance": "even"}

    def columns(seed: int) -> dict[str, NDArray[Any]]:
        return dict(scored(build_method(config), vectors, labels, seed=seed).table.columns)

    one, two = columns(1), columns(1)
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)
    random_parts = name not in ("moderate",)
    other = columns(2)
    drawn = any(one[key].tobytes() != other[key].tobytes() for key in one)
    assert drawn == random_parts


@pytest.mark.parametrize("name", NAMES)
def test_float16_is_near_float32(name: str) -> None:
    rng = np.random.default_rng(8)
    vectors, labels = rng.normal(size=(200, 6)).astype(np.float32), rng.integers(0, 3, 200)
    config = {"name": name, "prune_ratio": 0.5, "score_epochs": 1}
    whole, half = (kept(build_method({**config, "storage": size}), vectors, labels) for size in ("float32", "float16"))
    assert np.intersect1d(whole, half).size > 80


def test_other_ratios_need_no_other_scoring_run_where_the_score_allows() -> None:
    rng = np.random.default_rng(9)
    vectors, labels = rng.normal(size=(80, 4)), rng.integers(0, 3, 80)
    for name in ("moderate", "semdedup", "ssp"):
        low = scored(build_method({"name": name, "prune_ratio": 0.25, "score_epochs": 1}), vectors, labels)
        method = build_method({"name": name, "prune_ratio": 0.75, "score_epochs": 1})
        assert "prune_ratio" in method.selection_fields
        other = Selector(method, 80, 3, labels=labels)
        other.table.load_arrays(low.table.to_arrays())
        assert other.begin_epoch(1).ids.tolist() == kept(method, vectors, labels)
    for name in ("d2", "herding", "infomax", "k_center"):
        low = scored(build_method({"name": name, "prune_ratio": 0.25, "score_epochs": 1}), vectors, labels)
        method = build_method({"name": name, "prune_ratio": 0.75, "score_epochs": 1})
        assert "prune_ratio" not in method.selection_fields
        other = Selector(method, 80, 3, labels=labels)
        other.table.load_arrays(low.table.to_arrays())
        with pytest.raises(ValueError, match="ranked 60 samples, not 20: score again with this prune_ratio"):
            other.begin_epoch(1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "k_center", "parts": 0}, "parts 0 must be at least 1, or null"),
        ({"name": "herding", "balance": "drop"}, "method.balance = 'drop'"),
        ({"name": "herding", "score_epochs": 0}, "score_epochs 0 must be at least 1"),
        ({"name": "k_center", "storage": "float64"}, "method.storage = 'float64'"),
        ({"name": "d2", "drop_hardest": 0.6}, "drop_hardest 0.6 is above prune_ratio 0.5: lower it"),
        ({"name": "d2", "drop_hardest": 1.5}, "drop_hardest 1.5 is outside [0, 1]"),
        ({"name": "d2", "neighbors": -1}, "neighbors -1 and gamma 0.1 must be at least 0"),
        ({"name": "d2", "difficulty": "loss"}, "method.difficulty = 'loss'"),
        ({"name": "d2", "prune_ratio": {"schedule": "linear"}}, "one subset takes no schedule"),
        ({"name": "infomax", "alpha": -0.1}, "neighbors 5 and alpha -0.1 must be at least 0"),
        ({"name": "infomax", "score": "aum"}, "method.score = 'aum'"),
        ({"name": "moderate", "center": "mode"}, "method.center = 'mode'"),
        ({"name": "moderate", "drop_hardest": 0.1}, "drop_hardest goes with scores that have a hard end"),
        ({"name": "semdedup", "clusters": 0}, "clusters 0 must be at least 1, or null"),
        ({"name": "semdedup", "first": "last"}, "method.first = 'last'"),
        ({"name": "ssp", "clusters": -3}, "clusters -3 must be at least 1, or null"),
        ({"name": "ssp", "class_share": 2.0}, "class_share 2.0 is outside [0, 1]"),
        ({"name": "ssp", "class_share": 0.5, "balance": "even"}, "class_share 0.5 goes with the rules top and bottom"),
        ({"name": "ssp", "class_share": 0.5, "rule": "middle"}, "class_share 0.5 goes with the rules top and bottom"),
    ],
)
def test_mistakes_are_one_line_with_the_cure(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_method(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config", [{"name": "moderate"}, {"name": "k_center", "balance": "even"}, {"name": "ssp", "class_share": 0.5}]
)
def test_labels_are_required(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs labels"):
        Selector(build_method(config), 5, 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_embedding_is_named(name: str) -> None:
    selector = Selector(build_method({"name": name, "score_epochs": 1}), 4, 3, labels=[0, 1, 0, 1])
    selector.begin_epoch(0)
    signals = {"loss": np.ones(4), "margin": np.ones(4), "el2n": np.ones(4)}
    selector.observe(np.arange(4), signals, 0)
    vectors = np.array([[1.0, 2.0], [np.nan, 1.0], [0.0, 1.0], [1.0, np.inf]])
    selector.observe(np.arange(4), {**signals, "embedding": vectors}, 0, sweep=True)
    with pytest.raises(ValueError, match=r"ids \[1, 3\]") as caught:
        selector.begin_epoch(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_the_sweep_is_refused(name: str) -> None:
    run = SyntheticRun(build_method({"name": name, "score_epochs": 1}))
    run.selector.begin_epoch(0)
    run.observe(np.arange(41), 0)
    with pytest.raises(ValueError, match=r"41 samples .*have no .*shard\.sweep"):
        run.selector.begin_epoch(1)
