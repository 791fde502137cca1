"""DynaMS: reference numbers of budgets and balanced choices, and a naive transcription on random runs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Selector
from rayprune.core.schedule import block_starts, kept_by_block
from rayprune.methods import DynaMS, Method, Shuffled

FAMILIES = ["power", "polynomial", "linear", "constant", "step"]


def run(method: Method, num_samples: int, num_epochs: int, labels: Any, distances: Any) -> list[Any]:
    """Return the selections of a run whose sweeps report distances(epoch) -> (N,) or (N, C)."""
    selector = Selector(method, num_samples, num_epochs, seed=0, labels=labels)
    selections = []
    for epoch in range(num_epochs):
        selection = selector.begin_epoch(epoch)
        selector.observe(selection.ids, {"loss": np.ones(selection.num_kept)}, epoch)
        if selection.num_scored:
            assert selection.sweep == "all"
            ids = np.arange(num_samples)
            selector.observe(ids, {method.sweep_signals[0]: distances(epoch)}, epoch, sweep=True)
        selections.append(selection)
    return selections


def test_the_control_keeps_a_permutation_for_a_block() -> None:
    distances = np.random.default_rng(0).random(60)
    method = Shuffled(of=DynaMS(budget=0.7, block_epochs=2, warmup_epochs=1))
    kept = [set(selection.ids.tolist()) for selection in run(method, 60, 7, np.arange(60) % 3, lambda _: distances)]
    assert [len(ids) for ids in kept[:3]] == [60, 60, 60], "the warm-up and the first block are full"
    assert kept[3] == kept[4]
    assert kept[5] == kept[6]
    assert len(kept[5]) < len(kept[3]) < 60
    assert not kept[5] < kept[3], "the next block has another permutation"


@pytest.mark.parametrize(("budget", "exponent"), [(0.6, 0.25140), (0.4, 0.47027), (0.8, 0.10717)])
def test_the_power_law_meets_its_budget(budget: float, exponent: float) -> None:
    kept = kept_by_block("power", budget, 200, 10)
    assert len(kept) == 20
    assert -math.log2(kept[1]) == pytest.approx(exponent, abs=1e-5)
    assert sum(kept) == pytest.approx(budget * 20, abs=1e-9)


def test_the_number_of_visits_of_fifty_thousand_samples() -> None:
    kept = kept_by_block("power", 0.6, 200, 10)
    assert kept[1] == pytest.approx(0.84008, abs=1e-5)
    assert kept[19] == pytest.approx(0.47090, abs=1e-5)
    num_samples = 50_000
    distances = np.random.default_rng(0).random(num_samples)
    labels = np.arange(num_samples) % 10
    selector = Selector(DynaMS(), num_samples, 200, labels=labels)
    visits = 0
    for epoch in range(0, 200, 10):
        selector.begin_epoch(epoch)
        visits += 10 * selector.begin_epoch(epoch).num_kept
        selector.observe(np.arange(num_samples), {"boundary": distances}, epoch, sweep=True)
    assert visits == 5_999_990


@pytest.mark.parametrize(("power", "final"), [(1, 0.1111), (2, 0.3234), (3, 0.3956)])
def test_the_polynomial_with_a_warm_up_meets_its_budget(power: float, final: float) -> None:
    kept = kept_by_block("polynomial", 0.6, 200, 10, 20, power=power)
    assert kept[-1] == pytest.approx(final, abs=5e-5)
    assert 20 + 10 * math.fsum(kept) == pytest.approx(120, abs=1e-9)


def least_visits(family: str, num_epochs: int, block: int, warmup: int) -> float:
    """Count the fewest epochs' worth of visits that a family allows."""
    starts = list(range(warmup, num_epochs, block))
    total = float(min(warmup, num_epochs))
    for epoch in range(warmup, num_epochs):
        number = (epoch - warmup) // block
        if family in {"power", "constant"}:
            total += number == 0
        elif family == "step":
            falls = [int(share * num_epochs + 1e-9) for share in (0.3, 0.6)]
            total += not any(starts[0] < fall <= starts[number] for fall in falls)
        else:
            x = number / max(len(starts) - 1, 1)
            total += (1 - x) ** (1.0 if family == "linear" else 2.0)
    return total


@given(st.sampled_from(FAMILIES), st.integers(2, 60), st.integers(1, 12), st.integers(0, 10), st.floats(0.05, 1.0))
def test_every_family_meets_its_budget_exactly(
    family: Any, num_epochs: int, block: int, warmup: int, budget: float
) -> None:
    try:
        kept = kept_by_block(family, budget, num_epochs, block, warmup, milestones=(0.3, 0.6))
    except ValueError:
        # Refused only if even the steepest schedule of the family, epoch by epoch, keeps more than the budget.
        assert budget * num_epochs <= least_visits(family, num_epochs, block, warmup) + 1e-6
        return
    starts = block_starts(num_epochs, block, warmup)
    by_epoch = [1.0] * min(warmup, num_epochs)
    for epoch in range(warmup, num_epochs):
        by_epoch.append(kept[sum(start <= epoch for start in starts) - 1])
    assert math.fsum(by_epoch) == pytest.approx(budget * num_epochs, abs=1e-9)
    assert all(0 < ratio <= 1 for ratio in kept)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(kept))
    assert not kept or kept[0] == 1


def test_balanced_choices_by_hand() -> None:
    distances = np.arange(1, 9) / 10
    labels = np.array([0] * 5 + [1] * 3)
    for balance, expected in (("none", [0, 1, 2, 3, 4]), ("even", [0, 1, 2, 5, 6])):
        method = DynaMS(prune_ratio=3 / 8, block_epochs=1, balance=balance)  # type: ignore[arg-type]
        assert run(method, 8, 2, labels, lambda _: distances)[1].ids.tolist() == expected


def test_other_classes_take_quotas_that_a_class_cannot_fill() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 1)
    method = DynaMS(prune_ratio=0.4, block_epochs=1)
    kept = run(method, 10, 2, labels, lambda _: np.arange(10.0))[1].ids
    assert kept.tolist() == [0, 1, 2, 7, 8, 9]


def test_a_budget_of_one_keeps_all_samples_without_sweeps() -> None:
    for selection in run(DynaMS(budget=1.0, block_epochs=2), 20, 9, np.arange(20) % 3, None):
        assert selection.ids.tolist() == list(range(20))
        assert (selection.weights == 1).all()
        assert selection.num_scored == 0
        assert selection.requested == 0


def naive(method: DynaMS, num_samples: int, num_epochs: int, labels: Any, distances: Any) -> list[list[int]]:
    """Choose block by block with sorted lists only."""
    kept: list[list[int]] = []
    current = list(range(num_samples))
    full = method.warmup_epochs + method.block_epochs
    gammas = kept_by_block(method.schedule, method.budget, num_epochs, method.block_epochs, method.warmup_epochs)
    for epoch in range(num_epochs):
        if epoch >= full and (epoch - method.warmup_epochs) % method.block_epochs == 0:
            count = max(1, round(gammas[(epoch - method.warmup_epochs) // method.block_epochs] * num_samples))
            nearest = distances(epoch - 1)
            queues = {
                c: sorted((nearest[i], i) for i in range(num_samples) if labels[i] == c) for c in sorted(set(labels))
            }
            current = []
            while len(current) < count:  # round-robin over the labels until the count is reached
                for queue in queues.values():
                    if queue and len(current) < count:
                        current.append(queue.pop(0)[1])
        kept.append(sorted(current))
    return kept


@given(
    st.integers(4, 40), st.integers(2, 14), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 99)
)
def test_runs_equal_a_naive_transcription(
    num: int, epochs: int, block: int, warmup: int, classes: int, seed: int
) -> None:
    method = DynaMS(budget=0.7, block_epochs=block, warmup_epochs=warmup)
    labels = np.random.default_rng(seed).integers(0, classes, num)

    def distances(epoch: int) -> Any:
        return np.random.default_rng([seed, epoch]).integers(0, 6, num).astype(np.float32)  # with ties

    try:
        expected = naive(method, num, epochs, labels, distances)
    except ValueError:
        with pytest.raises(ValueError, match=r"budget|warmup_epochs"):
            run(method, num, epochs, labels, distances)
        return
    selections = run(method, num, epochs, labels, distances)
    assert [selection.ids.tolist() for selection in selections] == expected


def test_base_serves_class_after_class() -> None:
    rng = np.random.default_rng(3)
    distances = rng.random((30, 3)).astype(np.float32)
    method = DynaMS(prune_ratio=0.5, block_epochs=1, balance="base")
    kept = run(method, 30, 2, None, lambda _: distances)[1].ids.tolist()
    remaining, expected = set(range(30)), []
    for label in range(3):
        nearest = sorted(remaining, key=lambda i: (distances[i, label], i))[:5]
        expected += nearest
        remaining -= set(nearest)
    assert kept == sorted(expected)


def test_a_block_keeps_its_choice_across_a_resume() -> None:
    labels = np.arange(40) % 4

    def distances(epoch: int) -> Any:
        return np.random.default_rng(epoch).random(40)

    method = DynaMS(budget=0.7, block_epochs=3)
    whole = run(method, 40, 9, labels, distances)
    for block in ((0, 1, 2), (3, 4, 5), (6, 7, 8)):
        assert len({tuple(whole[epoch].ids) for epoch in block}) == 1
    assert [bool(selection.num_scored) for selection in whole] == [
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    selector = Selector(method, 40, 9, labels=labels)
    for epoch in range(5):
        selection = selector.begin_epoch(epoch)
        selector.observe(selection.ids, {"loss": np.ones(selection.num_kept)}, epoch)
        if selection.num_scored:
            selector.observe(np.arange(40), {"boundary": distances(epoch)}, epoch, sweep=True)
    again = Selector(method, 40, 9, labels=labels)
    again.load_state_dict({name: np.array(array) for name, array in selector.state_dict().items()})
    assert again.begin_epoch(5).ids.tolist() == whole[5].ids.tolist()
    assert again.begin_epoch(5).facts["threshold"] == whole[5].facts["threshold"]
