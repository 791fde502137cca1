"""Thinning draws an exact number uniformly within each stratum, and its weights make the sum unbiased."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core import table, thinning
from rayprune.core.selection import Selection
from rayprune.core.thinning import round_at_random, thin, thin_with_class_floor

NUM_DRAWS = 3_000


def kept_masks(strata: NDArray[np.uint8], ratios: list[float], num_draws: int = NUM_DRAWS) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    draws = [thin(strata, np.array(ratios), rng).codes != 0 for _ in range(num_draws)]
    return np.array(draws, dtype=np.float64)


def weighted_sum(selection: Selection, values: NDArray[np.float64]) -> float:
    return float(values[selection.ids] @ selection.weights.astype(np.float64))


@pytest.mark.parametrize("chunk_rows", [1 << 16, 7, 1])
def test_every_sample_and_every_pair_is_equally_likely(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK_NUMBERS", chunk_rows)
    num, kept = 15, 6
    masks_RN = kept_masks(np.ones(num, dtype=np.uint8), [kept / num])
    assert (masks_RN.sum(axis=1) == kept).all()
    share = kept / num
    counts = masks_RN.sum(axis=0)
    # Counts of fixed-size draws are negatively correlated: (N − 1)/N times the sum is chi-square with N − 1 degrees.
    chi_square = ((counts - NUM_DRAWS * share) ** 2 / (NUM_DRAWS * share * (1 - share))).sum() * (num - 1) / num
    assert chi_square < num - 1 + 5 * math.sqrt(2 * (num - 1))
    both = kept * (kept - 1) / (num * (num - 1))
    pairs_NN = masks_RN.T @ masks_RN / NUM_DRAWS
    off_diagonal = pairs_NN[~np.eye(num, dtype=bool)]
    assert np.abs(off_diagonal - both).max() < 5 * math.sqrt(both * (1 - both) / NUM_DRAWS)


@pytest.mark.parametrize("chunk_rows", [1 << 16, 5])
def test_each_stratum_has_an_exact_count(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "CHUNK_NUMBERS", chunk_rows)
    strata = np.random.default_rng(1).permutation(np.repeat(np.arange(4, dtype=np.uint8), [6, 10, 8, 5]))
    masks_RN = kept_masks(strata, [0.5, 0.25, 1.0], 1_000)
    for stratum, kept in enumerate([6, 5, 2, 5]):
        assert (masks_RN[:, strata == stratum].sum(axis=1) == kept).all()
    frequency = masks_RN.mean(axis=0)
    assert np.abs(frequency - np.array([1.0, 0.5, 0.25, 1.0])[strata]).max() < 0.08


def test_fractional_counts_round_up_and_down() -> None:
    masks_RN = kept_masks(np.ones(7, dtype=np.uint8), [0.3])
    sizes, counts = np.unique(masks_RN.sum(axis=1), return_counts=True)
    assert sizes.tolist() == [2, 3]
    assert abs(counts[1] / NUM_DRAWS - 0.1) < 0.03
    assert np.abs(masks_RN.mean(axis=0) - 0.3).max() < 0.05


def test_rounding_has_the_right_mean_and_a_rounded_sum() -> None:
    rng = np.random.default_rng(0)
    expected = np.array([0.5, 0.25, 2.25, 3.0, 0.9, 1 - 1e-12, 0.1])
    rounded_RS = np.array([round_at_random(expected, rng) for _ in range(20_000)])
    assert np.isin(rounded_RS - np.floor(expected + 1e-9), [0, 1]).all()
    assert np.abs(rounded_RS.mean(axis=0) - expected).max() < 0.02
    assert (rounded_RS[:, [3, 5]] == [3, 1]).all()
    assert (rounded_RS.sum(axis=1) == 8).all()


@pytest.mark.parametrize("ratios", [[0.5, 0.2], [0.9, 0.37], [1 / 3, 1.0]])
def test_the_weighted_sum_is_unbiased(ratios: list[float]) -> None:
    strata = np.random.default_rng(2).integers(0, 3, size=23).astype(np.uint8)
    values = np.random.default_rng(3).normal(2.0, 3.0, size=23)
    sums = [weighted_sum(thin(strata, np.array(ratios), np.random.default_rng(s)), values) for s in range(NUM_DRAWS)]
    assert abs(np.mean(sums) - values.sum()) < 4 * np.std(sums) / math.sqrt(NUM_DRAWS)


def test_many_strata_keep_exact_counts() -> None:
    num_strata, num = 5_000, 20_000
    strata = (np.arange(num) % num_strata + 1).astype(np.uint16)
    ratios = np.linspace(0.25, 1.0, num_strata)
    selection = thin(strata, ratios, np.random.default_rng(0))
    kept = np.bincount(strata[selection.ids], minlength=num_strata + 1)[1:]
    assert (np.abs(kept - 4 * ratios) < 1).all()
    assert abs(selection.num_kept - (4 * ratios).sum()) <= 1
    assert abs((num - selection.num_kept) - selection.expected_drops) <= 1
    assert (selection.weights == (1 / ratios).astype(np.float32)[strata[selection.ids] - 1]).all()


@pytest.mark.parametrize("num_strata", [254, 255, 256, 65_534, 65_535])
def test_codes_are_wide_enough_for_all_strata(num_strata: int) -> None:
    strata = np.arange(num_strata + 1, dtype=np.uint32)
    selection = thin(strata, np.ones(num_strata), np.random.default_rng(0))
    assert selection.num_kept == num_strata + 1
    assert (selection.weights == 1).all()


def test_a_million_rows_take_less_than_half_a_second() -> None:
    strata = (np.random.default_rng(0).random(1_000_000) < 0.63).astype(np.uint8)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        selection = thin(strata, np.array([0.5]), np.random.default_rng(0))
        seconds.append(time.perf_counter() - begin)
    assert selection.codes.dtype == np.uint8
    assert abs(selection.realised - 0.5 * strata.mean()) < 1e-6
    assert min(seconds) < 0.5


@pytest.mark.parametrize("class_floor", [0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("chunk_rows", [1 << 16, 11])
def test_the_class_floor_is_exact_and_unbiased(
    class_floor: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "CHUNK_NUMBERS", chunk_rows)
    rng = np.random.default_rng(4)
    labels = np.repeat(np.arange(5, dtype=np.uint8), [30, 12, 7, 2, 1])
    strata = rng.integers(0, 3, size=labels.size).astype(np.uint8)
    strata[labels == 1] = 2  # all of class 1 is in the stratum that is thinned most
    values = rng.normal(2.0, 3.0, size=labels.size)
    sums = []
    for seed in range(800):
        draw = np.random.default_rng(seed)
        selection = thin_with_class_floor(strata, np.array([0.5, 0.2]), labels, class_floor, draw)
        kept = np.bincount(labels[selection.ids], minlength=5)
        assert (kept >= np.ceil(class_floor * np.bincount(labels) - 1e-9)).all()
        sums.append(weighted_sum(selection, values))
    error = np.std(sums) / math.sqrt(len(sums))
    assert (error == 0) == (class_floor == 1)
    # Weights are float32.
    assert abs(np.mean(sums) - values.sum()) <= 4 * error + 1e-5


def test_a_floor_that_does_not_bind_leaves_counts_and_weights() -> None:
    labels = np.repeat(np.arange(4, dtype=np.uint8), 500)
    strata = np.ones(2_000, dtype=np.uint8)
    selection = thin_with_class_floor(strata, np.array([0.5]), labels, 0.2, np.random.default_rng(0))
    assert np.bincount(labels[selection.ids]).tolist() == [250] * 4
    assert set(selection.weights.tolist()) == {2.0}


def test_strata_above_the_limit_of_a_draw_are_thinned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "_MAX_STRATUM", 7)
    strata = np.array([0, 1, 2] * 10, dtype=np.uint8)
    ratios = [0.3, 0.8]
    masks_RN = kept_masks(strata, ratios)
    for stratum, share in enumerate([1.0, *ratios]):
        rates = masks_RN[:, strata == stratum].mean(axis=0)
        assert rates == pytest.approx(share, abs=5 * math.sqrt(0.25 / NUM_DRAWS))
    assert (masks_RN.sum(axis=1) == 10 + 3 + 8).all(), "the sum over all parts is rounded once"
    selection = thin(strata, np.array(ratios), np.random.default_rng(0))
    assert selection.expected_drops == pytest.approx(7 + 2)
    expected = np.array([1.0, 1 / 0.3, 1 / 0.8], dtype=np.float32)[strata[selection.ids]]
    np.testing.assert_array_equal(selection.weights, expected)
