"""The windowed shuffle: a permutation, in windows that mix at least eight groups and end between batches.

Shapes: N samples, G groups, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Plan, Selection
from rayprune.core.plan import MIN_GROUPS, LastBatch, rows_of_groups, shuffle


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    batch_size: int
    window_rows: int
    kept_share: float
    seed: int
    last_batch: LastBatch

    @property
    def groups(self) -> np.ndarray:
        return np.cumsum([0, *self.sizes])

    def selection(self) -> Selection:
        rng = np.random.default_rng(self.seed)
        ids = np.flatnonzero(rng.random(sum(self.sizes)) < self.kept_share)
        return Selection.of_ids(ids, sum(self.sizes), weights=rng.choice([1.0, 2.0], size=ids.size))

    def plan(self, epoch: int = 1) -> Plan:
        return Plan.of_selection(
            self.selection(),
            self.batch_size,
            self.seed,
            epoch,
            self.last_batch,
            groups=self.groups,
            window_rows=self.window_rows,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        sizes=tuple(draw(st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(sum))),
        batch_size=draw(st.sampled_from([1, 4, 12, 48])),
        window_rows=draw(st.integers(1, 600)),
        kept_share=draw(st.sampled_from([0.05, 0.5, 1.0])),
        seed=draw(st.integers(0, 2**40)),
        last_batch=draw(st.sampled_from(["pad", "drop"])),
    )


def groups_in(case: Case, rows: np.ndarray) -> set[int]:
    return set((np.searchsorted(case.groups, rows, side="right") - 1).tolist())


@given(cases())
def test_the_order_is_a_permutation_of_the_kept_ids(case: Case) -> None:
    order = case.selection().ids.astype(np.uint32)
    shuffle(order, case.groups, case.batch_size, case.window_rows, np.random.default_rng(case.seed))
    assert np.sort(order).tolist() == case.selection().ids.tolist()


@given(cases())
def test_every_window_mixes_eight_groups_and_whole_batches(case: Case) -> None:
    order = case.selection().ids
    stops = shuffle(order, case.groups, case.batch_size, case.window_rows, np.random.default_rng(case.seed)).tolist()
    assert stops == sorted(set(stops))
    assert stops[-1:] == ([order.size] if order.size else [])
    assert all(stop % case.batch_size == 0 for stop in stops[:-1])
    at_least = min(MIN_GROUPS, len(groups_in(case, order)))
    for start, stop in pairwise([0, *stops]):
        assert len(groups_in(case, order[start:stop])) >= at_least


@given(cases())
def test_a_group_is_in_at_most_two_adjacent_windows(case: Case) -> None:
    order = case.selection().ids
    stops = shuffle(order, case.groups, case.batch_size, case.window_rows, np.random.default_rng(case.seed)).tolist()
    windows = [groups_in(case, order[start:stop]) for start, stop in pairwise([0, *stops])]
    for window, after in pairwise(windows):
        if case.batch_size == 1:
            assert not window & after, "windows of single rows end with their groups"
    for group in range(len(case.sizes)):
        numbers = [number for number, window in enumerate(windows) if group in window]
        assert len(numbers) <= 2
        assert not numbers or numbers[-1] - numbers[0] < 2


@given(cases())
def test_a_plan_in_windows_is_a_valid_plan(case: Case) -> None:
    plan, selection = case.plan(), case.selection()
    rows, padding = plan.order[: plan.num_rows], plan.order[plan.num_rows :]
    assert plan.order.size % case.batch_size == 0
    assert np.unique(rows).size == rows.size
    if case.last_batch == "pad":
        assert np.sort(rows).tolist() == selection.ids.tolist()
        assert padding.size == -selection.num_kept % case.batch_size
    else:
        assert padding.size == 0
        assert plan.num_rows == selection.num_kept // case.batch_size * case.batch_size
    last = plan.order[-case.batch_size :]
    if padding.size and sum(case.sizes) >= case.batch_size:
        assert np.unique(last).size == case.batch_size
    assert plan.weights(0, plan.order.size).tolist() == selection.weights_of(rows).tolist() + [0.0] * padding.size
    for world_size in (world for world in (1, 2, 3, 4) if case.batch_size % world == 0):
        parts = [plan.rank_rows(rank, world_size, 0, plan.num_steps)[0] for rank in range(world_size)]
        assert {ids.size for ids in parts} == {plan.order.size // world_size}
        stacked = np.stack([ids.reshape(plan.num_steps, case.batch_size // world_size) for ids in parts], axis=1)
        assert stacked.ravel().tolist() == plan.order.tolist()


@given(cases(), st.integers(0, 5))
def test_blocks_cover_every_step_once_and_end_with_windows(case: Case, start: int) -> None:
    plan = case.plan()
    ends = {stop // case.batch_size for stop in plan.window_stops.tolist()} | {plan.num_steps}
    for world_size in (world for world in (1, 2, 4) if case.batch_size % world == 0):
        size = case.batch_size // world_size
        for row_bytes in (1, 2**20):  # 32,768 and 64 rows
            limit = max(1, min(32_768, 2**26 // row_bytes) // size)
            blocks = plan.blocks(world_size, row_bytes, start)
            assert [block.rank for block in blocks] == list(range(world_size)) * (len(blocks) // world_size)
            spans = [(block.start_step, block.stop_step) for block in blocks[::world_size]]
            steps = [step for first, stop in spans for step in range(first, stop)]
            assert steps == list(range(start, plan.num_steps))
            for first, stop in spans:
                assert stop - first <= limit
                assert stop in ends or stop - first == limit


@given(cases())
def test_seed_and_epoch_determine_the_order_and_the_hash(case: Case) -> None:
    plan = case.plan()
    assert plan.hash == case.plan().hash
    assert plan.order.tolist() == case.plan().order.tolist()
    other = replace(case, seed=case.seed + 1, kept_share=1.0).plan()
    if sum(case.sizes) > 50 and case.kept_share == 1.0 and plan.num_rows > 40:
        assert case.plan(epoch=2).hash != plan.hash != other.hash


def test_plan_hashes_without_groups_are_stable() -> None:
    selection = Selection.of_ids(np.arange(0, 1000, 3), 1000, weights=np.resize([1.0, 2.0], 334))
    assert Plan.of_selection(selection, 32, 7, 2).hash == "64b08790ed3e1986a6139ce3bd44eb03"
    assert Plan.of_selection(selection, 32, 7, 2, "drop").hash == "6e714109e744c6858b98eac3a9002c7f"
    assert Plan.of_selection(selection, 32, 7, 2).window_stops.size == 0


def test_plan_hashes_with_groups_are_stable() -> None:
    selection = Selection.full(1000)
    plan = Plan.of_selection(selection, 32, 7, 2, groups=np.arange(0, 1001, 20), window_rows=300)
    assert plan.hash == "146a422ce2890e3e7db0f0f004d32ca5"


def test_windows_have_eight_large_groups_or_window_rows_of_small_ones() -> None:
    order = np.arange(64_000)
    rng = np.random.default_rng(0)
    large = shuffle(order.copy(), np.arange(0, 64_001, 1_000), 10, 5_000, rng)
    assert large.tolist() == [8_000 * window for window in range(1, 9)]
    small = shuffle(order.copy(), np.arange(0, 64_001, 100), 10, 5_000, rng)
    assert np.diff(small, prepend=0).tolist() == [5_000] * 12 + [4_000]


def test_pruned_rows_count_toward_window_rows() -> None:
    kept = np.arange(0, 64_000, 4)
    stops = shuffle(kept, np.arange(0, 64_001, 100), 10, 5_000, np.random.default_rng(0))
    assert stops[0] == 1_250


@pytest.mark.parametrize("epoch", range(3))
def test_padding_comes_from_the_groups_of_the_last_window(epoch: int) -> None:
    selection = Selection.of_mask(np.arange(64_000) % 2 == 0)
    groups = np.arange(0, 64_001, 1_000)
    plan = Plan.of_selection(selection, 1_024, 0, epoch, groups=groups, window_rows=8_000)
    padding, window = plan.order[plan.num_rows :], plan.order[plan.window_stops[-2] : plan.num_rows]
    assert padding.size == -32_000 % 1_024
    assert set(padding.tolist()) <= set(rows_of_groups(window, groups).tolist())
    few = Plan.of_selection(Selection.of_ids([3], 64_000), 2_048, 0, epoch, groups=groups)
    assert np.unique(few.order).size == 2_048, "other ids complete the batch if the group is too small"


def test_a_window_is_shuffled_uniformly() -> None:
    counts_NP = np.zeros((9, 9))
    for seed in range(4_000):
        plan = Plan.of_selection(Selection.full(9), 9, seed, 0, groups=np.array([0, 4, 9]))
        counts_NP[np.arange(9), plan.order] += 1
    assert np.abs(counts_NP / 4_000 - 1 / 9).max() < 5 * np.sqrt(1 / 9 * 8 / 9 / 4_000)
