"""Thresholds of early exits against the reference program's numbers and against loops over samples.

Shapes: P budgets, K exits, N samples, C classes. tests/golden/l2w_*.npz hold what the program that goes with the paper
(arXiv 2209.08310) gives on synthetic softmax outputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.experiments.early_exit.thresholds import (
    BUDGETS,
    chosen_exits,
    evaluate_dynamic,
    exit_quotas,
    exit_shares,
    find_thresholds,
)
from tests.support.paths import GOLDEN


def golden(name: str) -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as stored:
        return dict(stored)


def test_the_shares_are_the_references_to_the_last_place() -> None:
    shares = np.stack([exit_shares(budget, 5) for budget in BUDGETS])
    assert shares.dtype == np.float32
    np.testing.assert_array_max_ulp(shares, golden("l2w_target_probs_K5")["probs"], maxulp=2)
    np.testing.assert_allclose(shares[14], [0.32778, 0.24584, 0.18438, 0.13828, 0.10371], atol=5e-6)


def test_the_quotas_are_the_references() -> None:
    stored = golden("l2w_allocation_counts")
    for (num_exits, budget, num_samples), counts in zip(stored["keys"], stored["counts"], strict=True):
        assert exit_quotas(budget, num_exits, num_samples).tolist() == counts[:num_exits].tolist()


@pytest.mark.parametrize(
    ("budget", "num_samples", "counts"),
    [
        (15, 512, [167, 125, 94, 70, 56]),
        (15, 8, [2, 1, 1, 1, 3]),
        (1, 512, [486, 24, 1, 0, 1]),
        (39, 512, [17, 34, 68, 132, 261]),
    ],
)
def test_the_quotas_of_the_papers_settings(budget: int, num_samples: int, counts: list[int]) -> None:
    assert exit_quotas(budget, 5, num_samples).tolist() == counts


def test_all_budgets_give_the_references_thresholds_accuracies_and_costs() -> None:
    stored = golden("l2w_dynamic_eval")
    held, held_right = predictions(stored["val_probs"], stored["val_y"])
    test, test_right = predictions(stored["test_probs"], stored["test_y"])
    unbounded = np.where(np.abs(stored["T"]) == 1e8, np.sign(stored["T"]) * np.inf, stored["T"])
    for row, budget in enumerate(BUDGETS):
        thresholds = find_thresholds(held, budget)
        np.testing.assert_array_equal(thresholds, unbounded[row].astype(np.float32))
        on_held = evaluate_dynamic(held, held_right, thresholds, stored["flops"])
        on_test = evaluate_dynamic(test, test_right, thresholds, stored["flops"])
        assert on_held.accuracy * 100 == pytest.approx(stored["acc_val"][row], abs=1e-9)
        assert on_test.accuracy * 100 == pytest.approx(stored["acc_test"][row], abs=1e-9)
        assert on_test.cost == pytest.approx(stored["avg_flops"][row], rel=1e-6)  # that of single precision
        np.testing.assert_allclose(exit_shares(budget, 5), stored["exit_dist"][row], rtol=1e-6)


def predictions(
    probs_KNC: NDArray[np.float32], labels_N: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return probs_KNC.max(axis=2), probs_KNC.argmax(axis=2) == labels_N


@st.composite
def confidences(draw: st.DrawFn) -> NDArray[np.float32]:
    """(K, N) confidences, of few different values where ties are wanted."""
    num_exits, num_samples = draw(st.integers(2, 6)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 10**6]))
    return (rng.integers(1, levels + 1, (num_exits, num_samples)) / levels).astype(np.float32)


def looped_thresholds(confidences_KN: NDArray[np.float32], budget: int) -> list[float]:
    """Walk through the samples one by one, as the papers describe it; nobody is +inf."""
    num_exits, num_samples = confidences_KN.shape
    shares = exit_shares(budget, num_exits)
    gone: set[int] = set()
    thresholds = []
    for exit_ in range(num_exits - 1):
        quota = math.floor(np.float32(num_samples) * shares[exit_])
        row, threshold, found = confidences_KN[exit_].tolist(), math.inf, 0
        for sample in sorted(range(num_samples), key=lambda each, row=row: -row[each]):
            if sample not in gone and found < quota:
                threshold, found = row[sample], found + 1
        gone |= {sample for sample in range(num_samples) if row[sample] >= threshold}
        thresholds.append(threshold)
    return [*thresholds, -math.inf]


@given(confidences(), st.sampled_from(BUDGETS))
def test_thresholds_are_those_of_a_loop(confidences_KN: NDArray[np.float32], budget: int) -> None:
    assert find_thresholds(confidences_KN, budget).tolist() == looped_thresholds(confidences_KN, budget)


@given(confidences(), st.sampled_from(BUDGETS), st.integers(0, 2**32 - 1))
def test_samples_leave_as_in_a_loop(confidences_KN: NDArray[np.float32], budget: int, seed: int) -> None:
    num_exits, num_samples = confidences_KN.shape
    thresholds = find_thresholds(confidences_KN, budget)
    others = np.random.default_rng(seed).permuted(confidences_KN, axis=1)
    right = np.random.default_rng(seed).random(others.shape) < 0.5
    costs = np.arange(1.0, num_exits + 1) ** 2
    exits = []
    for sample in range(num_samples):
        exits.append(next(k for k in range(num_exits) if others[k, sample] >= thresholds[k]))
    found = evaluate_dynamic(others, right, thresholds, costs)
    assert chosen_exits(others, thresholds).tolist() == exits
    assert found.accuracy == pytest.approx(np.mean([right[k, sample] for sample, k in enumerate(exits)]))
    assert found.cost == pytest.approx(np.mean([costs[k] for k in exits]))
    assert found.shares.sum() == pytest.approx(1.0)


def test_ties_leave_together_and_the_next_exits_get_who_is_left() -> None:
    ties = np.array([[0.9, 0.9, 0.9, 0.6]] * 3, np.float32)
    thresholds = find_thresholds(ties, 20)  # a quota of 1, 1 and 2
    assert chosen_exits(ties, thresholds).tolist() == [0, 0, 0, 1]
    saturated = find_thresholds(np.ones((3, 8), np.float32), 20)
    assert saturated.tolist() == [1.0, math.inf, -math.inf]


def test_an_exit_without_a_quota_lets_nobody_out() -> None:
    confident = np.full((4, 3), 1.0, np.float32)
    assert exit_quotas(39, 4, 3)[0] == 0
    assert find_thresholds(confident, 39)[0] == math.inf


def test_more_than_the_rest_is_the_rest() -> None:
    """Nine of ten tie at the first exit's quota of 3: one is left for the second's, and leaves."""
    first = np.array([0.9] * 9 + [0.5], np.float32)
    thresholds = find_thresholds(np.stack([first, first, first]), 20)
    assert thresholds.tolist() == [np.float32(0.9), 0.5, -math.inf]


def test_what_is_no_number_never_leaves_early_and_gives_no_thresholds() -> None:
    spoilt = np.array([[np.nan, 0.9], [np.nan, 0.9]], np.float32)
    assert chosen_exits(spoilt, np.array([0.5, -np.inf], np.float32)).tolist() == [1, 0]
    with pytest.raises(ValueError, match="NaN for 1 of 2 samples"):
        find_thresholds(spoilt, 20)
    with pytest.raises(ValueError, match="at least one sample"):
        find_thresholds(np.empty((2, 0), np.float32), 20)
