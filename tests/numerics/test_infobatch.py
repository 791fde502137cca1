"""InfoBatch against a transcription of its paper without NumPy, and against the reference's numbers.

Shapes: N samples, L the well-learned samples (candidates).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.core import Plan, Selection, Selector
from rayprune.methods import build_method

TEN = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 5.5]


def naive_candidates(scores: Sequence[float | None]) -> set[int]:
    """Return {i : s_i < mean(s)} with the mean over the samples that have a score."""
    known = [score for score in scores if score is not None]
    if not known:
        return set()
    mean = math.fsum(known) / len(known)
    return {i for i, score in enumerate(scores) if score is not None and score < mean}


def naive_percentile(scores: Sequence[float], q: float) -> float:
    ordered = sorted(scores)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def naive_keep_ratios(scores: Sequence[float], quantiles: Sequence[float], keep: Sequence[float]) -> list[float]:
    """Return each sample's keep ratio: that of the lowest threshold above its score."""
    thresholds = [naive_percentile(scores, q) for q in quantiles]
    ratios = []
    for score in scores:
        below = [k for threshold, k in zip(thresholds, keep, strict=True) if score < threshold]
        ratios.append(below[0] if below else 1.0)
    return ratios


def infobatch(**options: Any) -> Any:
    return build_method({"name": "infobatch", **options})


def second_epoch(
    scores: Sequence[float | None], seed: int = 0, num_epochs: int = 8, **options: Any
) -> tuple[Selector, Selection]:
    """Observe scores (None: not visited) in epoch 0, and select epoch 1."""
    selector = Selector(infobatch(**options), len(scores), num_epochs, seed)
    selector.begin_epoch(0)
    ids = [i for i, score in enumerate(scores) if score is not None]
    selector.observe(np.array(ids, dtype=int), {"loss": [scores[i] for i in ids]}, 0)
    return selector, selector.begin_epoch(1)


def candidates_of(selection: Selection) -> set[int]:
    """Return the ids that were dropped or weighted, which are the candidates."""
    heavier = selection.ids[selection.weights != 1.0]
    return set(np.flatnonzero(selection.codes == 0).tolist()) | set(heavier.tolist())


def test_the_first_epoch_is_full() -> None:
    selection = Selector(infobatch(), 1000, 10, seed=1).begin_epoch(0)
    assert selection.ids.tolist() == list(range(1000))
    assert (selection.weights == 1).all()
    assert selection.realised == selection.requested == 0


def test_one_candidate_of_four_is_dropped_or_doubled() -> None:
    outcomes = Counter()
    for seed in range(400):
        _, selection = second_epoch([1, 2, 3, 2], seed)
        weights = dict(zip(selection.ids.tolist(), selection.weights.tolist(), strict=True))
        outcomes[weights.pop(0, None)] += 1
        assert weights == {1: 1.0, 2: 1.0, 3: 1.0}
    assert set(outcomes) == {None, 2.0}
    assert 150 < outcomes[None] < 250


def test_nine_candidates_of_ten_are_halved() -> None:
    for seed in range(50):
        _, selection = second_epoch(TEN, seed)
        assert candidates_of(selection) == set(range(9))
        assert selection.weights_of(np.array([9])).tolist() == [1.0]
        assert selection.num_kept - 1 in {4, 5}


@pytest.mark.parametrize("prune_ratio", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_the_weighted_sum_is_ten_in_expectation(prune_ratio: float) -> None:
    sums = []
    for seed in range(1200):
        _, selection = second_epoch(TEN, seed, prune_ratio=prune_ratio)
        sums.append(float(np.array(TEN)[selection.ids] @ selection.weights))
    error = np.std(sums) / math.sqrt(len(sums))
    assert error < 0.15
    assert abs(np.mean(sums) - 10.0) < 4 * error
    reference = {0.3: 9.786, 0.5: 9.5, 0.7: 8.833, 0.8: 8.0, 0.9: 5.5}[prune_ratio]
    if reference < 9.6:  # the result of rounding counts down, a plausible mistake, is far away
        assert abs(np.mean(sums) - reference) > 4 * error


@pytest.mark.parametrize(("num_candidates", "kept"), [(5, 1), (10, 2), (20, 4), (100, 20)])
def test_counts_kept_at_eighty_percent(num_candidates: int, kept: int) -> None:
    for seed in range(20):
        _, selection = second_epoch([0.1] * num_candidates + [9.0], seed, prune_ratio=0.8)
        assert selection.num_kept - 1 == kept


@pytest.mark.parametrize(
    ("num_epochs", "anneal_start", "first_full"),
    [
        *[(8, 0.875, 7), (10, 0.875, 8), (90, 0.875, 78), (200, 0.875, 175), (300, 0.875, 262)],
        *[(5, 0.8, 4), (4, 1, 4), (4, 0, 0), (100, 0.29, 29)],
    ],
)
def test_annealed_epochs_are_full(num_epochs: int, anneal_start: float, first_full: int) -> None:
    selector = Selector(infobatch(anneal_start=anneal_start), 20, num_epochs, seed=0)
    for epoch in range(num_epochs):
        selection = selector.begin_epoch(epoch)
        selector.observe(selection.ids, {"loss": np.arange(20.0)[selection.ids]}, epoch)
        if epoch == 0 or epoch >= first_full:
            assert selection.ids.tolist() == list(range(20))
            assert (selection.weights == 1).all()
            assert selection.requested == 0
        else:
            assert selection.num_kept == 15
            assert selection.requested == 0.5


def test_scores_are_raw_losses_and_stay_while_pruned() -> None:
    selector, selection = second_epoch(TEN)
    assert selector.scores()["loss"].tobytes() == np.array(TEN, dtype=np.float32).tobytes()
    heavy = selection.ids[selection.weights == 2]
    pruned = np.flatnonzero(selection.codes == 0)
    assert heavy.size >= 4
    assert pruned.size >= 4
    losses = np.where(np.isin(selection.ids, heavy), 0.4, 3.0)
    selector.observe(selection.ids, {"loss": losses}, 1)
    assert (selector.scores()["loss"][heavy] == np.float32(0.4)).all()
    assert (losses * selection.weights)[np.isin(selection.ids, heavy)].tolist() == [0.8] * heavy.size
    assert selector.scores()["loss"][pruned].tobytes() == np.array(TEN, dtype=np.float32)[pruned].tobytes()
    assert (selector.table.last_visit[pruned] == 0).all()


def test_the_saving_of_static_exponential_losses() -> None:
    losses = torch.empty(50_000).exponential_(generator=torch.Generator().manual_seed(0)).numpy()
    selector = Selector(infobatch(), 50_000, 200, seed=0)
    drops = []
    for epoch in range(200):
        selection = selector.begin_epoch(epoch)
        selector.observe(selection.ids, {"loss": losses[selection.ids]}, epoch)
        drops.append(50_000 - selection.num_kept)
    assert drops[0] == 0
    assert drops[175:] == [0] * 25
    assert all(abs(count - 15_774) <= 1 for count in drops[1:175])
    assert round(100 * sum(drops) / (200 * 50_000), 1) == 27.4


@pytest.mark.parametrize("batch_size", [2, 4, 6])
def test_two_ranks_split_eleven_samples(batch_size: int) -> None:
    plan = Plan.of_selection(Selection.full(11), batch_size, seed=0, epoch=0)
    parts = [plan.rank_rows(rank, 2, 0, plan.num_steps) for rank in (0, 1)]
    rows = [ids[trains].tolist() for ids, _, trains in parts]
    assert [ids.size for ids, _, _ in parts] == [plan.num_steps * batch_size // 2] * 2
    assert not set(rows[0]) & set(rows[1])
    assert sorted(rows[0] + rows[1]) == list(range(11))


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 2.3025851, 1e-30, 1e30, 0.0])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 10, 70_001])
def test_constant_scores_prune_nothing(constant: float, num_samples: int) -> None:
    for options in ({}, {"quantiles": [20, 85], "keep": [0.25, 0.5]}):
        _, selection = second_epoch([constant] * num_samples, **options)
        assert selection.num_kept == num_samples
        assert (selection.weights == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_nonfinite_losses_are_reported_and_ignored(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rayprune"):
        selector, selection = second_epoch([*TEN, bad], seed=5)
    assert selector.num_nonfinite == 1
    assert selector.nonfinite_ids == [10]
    assert "ids [10]" in caplog.text
    _, without = second_epoch([*TEN, None], seed=5)
    assert selection.ids.tolist() == without.ids.tolist()
    assert selection.weights.tolist() == without.weights.tolist()


@pytest.mark.parametrize("seed", range(30))
def test_selections_equal_the_transcription(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num, ratio = int(rng.integers(1, 60)), float(rng.choice([0.1, 0.3, 0.5, 0.8]))
    losses = rng.gamma(1.0, 2.0, size=num).astype(np.float32)
    scores = [float(loss) if rng.random() < 0.8 else None for loss in losses]
    selector, selection = second_epoch(scores, seed, prune_ratio=ratio)
    expected = naive_candidates(scores)
    # A candidate is either dropped or weighs 1/k.
    assert candidates_of(selection) == expected
    members = [i for i in selection.ids.tolist() if i in expected]
    assert len(members) in {math.floor((1 - ratio) * len(expected)), math.ceil((1 - ratio) * len(expected) - 1e-9)}
    assert selection.weights_of(np.array(members, dtype=int)).tolist() == [np.float32(1 / (1 - ratio))] * len(members)
    others = sorted(set(range(num)) - expected)
    assert (selection.weights_of(np.array(others, dtype=int)) == 1).all()
    assert selector.table.visited.tolist() == [score is not None for score in scores]


@pytest.mark.parametrize(
    ("scores", "candidates", "wrong"),
    [
        ([1, 2, None, None], {0}, {"missing as 0": set(), "missing as 3, as the reference": {0, 1}}),
        (TEN, set(range(9)), {"median": set(range(5))}),
        ([1, 2, 3, 2], {0}, {"not strictly below": {0, 1, 3}}),
    ],
)
def test_wrong_formulas_give_other_candidates(
    scores: list[Any], candidates: set[int], wrong: dict[str, set[int]]
) -> None:
    _, selection = second_epoch(scores)
    assert naive_candidates(scores) == candidates
    assert candidates_of(selection) == candidates
    assert candidates_of(selection) not in wrong.values()


def test_stale_scores_stay_in_the_mean() -> None:
    scores, selector = list(TEN), Selector(infobatch(), 10, 8, seed=2)
    rng = np.random.default_rng(0)
    for epoch in range(7):
        selection = selector.begin_epoch(epoch)
        assert candidates_of(selection) == (naive_candidates(scores) if epoch else set())
        losses = rng.exponential(size=10).astype(np.float32) if epoch else np.array(TEN, dtype=np.float32)
        selector.observe(selection.ids, {"loss": losses[selection.ids]}, epoch)
        for i in selection.ids.tolist():
            scores[i] = float(losses[i])


@pytest.mark.parametrize(
    ("quantiles", "keep", "kept_share"), [([20, 85], [0.25, 0.5], 0.525), ([64], [0.5], 0.68)], ids=["20-85", "64"]
)
def test_quantile_presets_keep_their_shares(quantiles: list[float], keep: list[float], kept_share: float) -> None:
    losses = np.random.default_rng(1).permutation(10_000).astype(float)
    selector, selection = second_epoch(losses.tolist(), quantiles=quantiles, keep=keep)
    assert abs(selection.num_kept / 10_000 - kept_share) < 2e-4
    assert abs(selection.requested - (1 - kept_share)) < 2e-4
    assert abs(selection.realised - selection.requested) < 2e-4
    assert selection.weights_of(np.flatnonzero(losses > 8_600)).tolist() == [1.0] * 1_399
    assert abs(float(selection.weights.sum()) - 10_000) < 5
    assert selector.scores()["loss"].tolist() == losses.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_quantiles_equal_the_transcription(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quantiles, keep = [15.0, 40.0, 85.0], [0.25, 0.4, 0.8]
    scores = rng.exponential(size=int(rng.integers(3, 80))).astype(np.float32).tolist()
    _, selection = second_epoch(scores, seed, quantiles=quantiles, keep=keep)
    ratios = naive_keep_ratios(scores, quantiles, keep)
    for i, weight in zip(selection.ids.tolist(), selection.weights.tolist(), strict=True):
        assert weight == np.float32(1 / ratios[i])
    for ratio, size in Counter(ratios).items():
        kept = sum(ratios[i] == ratio for i in selection.ids.tolist())
        assert math.floor(ratio * size + 1e-9) <= kept <= math.ceil(ratio * size - 1e-9)


def test_three_samples_in_three_buckets_always_lose_one() -> None:
    for seed in range(200):
        _, selection = second_epoch([1, 2, 3], seed, quantiles=[20, 85], keep=[0.25, 0.5])
        assert selection.num_kept in {1, 2}


def test_ema_averages_the_score() -> None:
    rng, ema, num = np.random.default_rng(3), 0.25, 12
    selector = Selector(infobatch(ema=ema), num, 8, seed=0)
    expected: list[float | None] = [None] * num
    for epoch in range(6):
        selection = selector.begin_epoch(epoch)
        losses = rng.exponential(size=num)
        selector.observe(selection.ids, {"loss": losses[selection.ids]}, epoch)
        for i in selection.ids.tolist():
            old = expected[i]
            expected[i] = losses[i] if old is None else ema * losses[i] + (1 - ema) * old
        np.testing.assert_allclose(selector.scores()["loss"], np.array(expected, dtype=float), rtol=1e-5)


def test_prune_ratio_may_be_a_schedule() -> None:
    method = infobatch(prune_ratio={"schedule": "linear", "start": 0.0, "end": 0.75}, anneal_start=1.0)
    selector = Selector(method, 101, 4, seed=0)
    losses = np.array([0.1] * 100 + [9.0])
    kept = []
    for epoch in range(4):
        selection = selector.begin_epoch(epoch)
        selector.observe(selection.ids, {"loss": losses[selection.ids]}, epoch)
        kept.append((selection.num_kept, round(selection.requested, 6)))
    assert kept == [(101, 0.0), (76, 0.25), (51, 0.5), (26, 0.75)]


@pytest.mark.parametrize("target", [0.05, 0.2, 0.3, 0.45])
@pytest.mark.parametrize("class_floor", [0.0, 0.1])
def test_target_saving_is_reached(target: float, class_floor: float) -> None:
    num, num_epochs = 2_000, 40
    labels = np.arange(num) % 10
    selector = Selector(infobatch(target_saving=target, class_floor=class_floor), num, num_epochs, 0, labels)
    rng = np.random.default_rng(8)
    visits = 0
    for epoch in range(num_epochs):
        selection = selector.begin_epoch(epoch)
        visits += selection.num_kept
        selector.observe(selection.ids, {"loss": rng.exponential(size=selection.num_kept)}, epoch)
        assert (selection.requested > 0) == (1 <= epoch < 35)
        members = len(candidates_of(selection))
        if members and not class_floor:
            assert abs((num - selection.num_kept) - selection.requested * members) <= 1
    assert abs((1 - visits / (num * num_epochs)) / target - 1) < 0.01


@pytest.mark.parametrize(
    ("num_epochs", "options"),
    [
        (40, {"target_saving": 0.8}),
        (1, {"target_saving": 0.1}),
        (8, {"target_saving": 0.1, "anneal_start": 0.1}),
        (40, {"target_saving": 0.3, "max_prune_ratio": 0.3}),
    ],
)
def test_an_unreachable_target_is_refused_in_one_line(num_epochs: int, options: dict[str, Any]) -> None:
    selector = Selector(infobatch(**options), 100, num_epochs, seed=0)
    with pytest.raises(ValueError, match=r"target_saving .* cannot be reached") as caught:
        selector.begin_epoch(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        *[{"prune_ratio": 1.0}, {"prune_ratio": -0.1}, {"max_prune_ratio": 1.0}, {"anneal_start": 1.5}],
        *[{"ema": 0.0}, {"ema": 1.1}, {"target_saving": 0.0}, {"target_saving": 1.0}],
        {"target_saving": 0.2, "quantiles": [50], "keep": [0.5]},
        *[{"quantiles": quantiles, "keep": [0.5, 0.5]} for quantiles in ([50], [85, 20], [50, 50], [0, 50], [50, 100])],
        {"quantiles": [50], "keep": [0.0]},
    ],
    ids=str,
)
def test_hyperparameters_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).replace("_", ".")):
        infobatch(**options)
