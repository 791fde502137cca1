"""A Plan visits exactly the selection, splits it equally among ranks, and is otherwise independent of the world size.

Shapes: N samples, M kept, P rows with padding, GB the global batch, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Plan, Selection
from rayprune.core import plan as plan_module
from rayprune.core.plan import LastBatch


@dataclass(frozen=True)
class Case:
    num_samples: int
    batch_size: int
    world_sizes: tuple[int, ...]
    kept_share: float
    seed: int
    last_batch: LastBatch

    def selection(self) -> Selection:
        rng = np.random.default_rng(self.seed)
        ids = np.flatnonzero(rng.random(self.num_samples) < self.kept_share)
        return Selection.of_ids(ids, self.num_samples, weights=rng.choice([0.5, 1.0, 2.0], size=ids.size))

    def plan(self, epoch: int = 3) -> Plan:
        return Plan.of_selection(self.selection(), self.batch_size, self.seed, epoch, self.last_batch)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch_size = draw(st.integers(1, 64))
    return Case(
        num_samples=draw(st.integers(1, 300)),
        batch_size=batch_size,
        world_sizes=tuple(w for w in range(1, batch_size + 1) if batch_size % w == 0),
        kept_share=draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0])),
        seed=draw(st.integers(0, 2**40)),
        last_batch=draw(st.sampled_from(["pad", "drop"])),
    )


def joined(parts: list[tuple[Any, Any, Any]]) -> list[list[Any]]:
    """Concatenate rank rows and return ids, weights and the trained mask as lists."""
    return [np.concatenate(column).tolist() for column in zip(*parts, strict=True)] if parts else [[], [], []]


@given(cases())
def test_the_rows_are_the_selection_and_valid_padding(case: Case) -> None:
    selection, plan = case.selection(), case.plan()
    rows, padding = plan.order[: plan.num_rows], plan.order[plan.num_rows :]
    assert plan.order.size == plan.num_steps * case.batch_size
    assert plan.order.dtype.kind == "u"
    assert np.unique(rows).size == rows.size
    if case.last_batch == "drop":
        assert padding.size == 0
        assert plan.num_rows == selection.num_kept - selection.num_kept % case.batch_size
        assert set(rows.tolist()) <= set(selection.ids.tolist())
    else:
        assert sorted(rows.tolist()) == selection.ids.tolist()
        assert padding.size == -selection.num_kept % case.batch_size
    assert (padding < case.num_samples).all()
    if padding.size and case.num_samples >= case.batch_size:
        assert np.unique(plan.order[-case.batch_size :]).size == case.batch_size
    weights = plan.weights(0, plan.order.size)
    assert weights.tolist() == selection.weights_of(rows).tolist() + [0.0] * padding.size


@given(cases())
def test_every_batch_is_split_equally_among_ranks(case: Case) -> None:
    plan = case.plan()
    weights_P = plan.weights(0, plan.order.size)
    for world_size in case.world_sizes:
        parts = [plan.rank_rows(rank, world_size, 0, plan.num_steps) for rank in range(world_size)]
        assert {ids.size for ids, _, _ in parts} == {plan.order.size // world_size}
        assert {ids.dtype for ids, _, _ in parts} == {np.dtype(np.int64)}
        assert {weights.dtype for _, weights, _ in parts} == {np.dtype(np.float32)}
        size = case.batch_size // world_size
        # Stacked, the ranks' batches are the global batches in order, whatever the world size.
        stacked = [np.stack([p[k].reshape(-1, size) for p in parts], axis=1).ravel().tolist() for k in range(3)]
        assert stacked[0] == plan.order.tolist()
        assert stacked[1] == weights_P.tolist()
        assert stacked[2] == [row < plan.num_rows for row in range(plan.order.size)]


@given(cases(), st.data())
def test_a_ranks_rows_of_some_steps_are_a_slice(case: Case, data: st.DataObject) -> None:
    plan, size = case.plan(), case.batch_size
    start = data.draw(st.integers(0, plan.num_steps))
    stop = data.draw(st.integers(start, plan.num_steps))
    world_size = data.draw(st.sampled_from(case.world_sizes))
    rank = data.draw(st.integers(0, world_size - 1))
    own = size // world_size
    expected = [plan.order[s * size + rank * own : s * size + (rank + 1) * own] for s in range(start, stop)]
    ids, weights, trains = plan.rank_rows(rank, world_size, start, stop)
    assert ids.tolist() == [i for batch in expected for i in batch.tolist()]
    steps = [plan.rank_rows(rank, world_size, step, step + 1) for step in range(start, stop)]
    assert [ids.tolist(), weights.tolist(), trains.tolist()] == joined(steps)


@given(cases(), st.data())
def test_blocks_cover_every_step_of_every_rank_once(case: Case, data: st.DataObject) -> None:
    plan = case.plan()
    world_size = data.draw(st.sampled_from(case.world_sizes))
    start = data.draw(st.integers(0, plan.num_steps))
    row_bytes, max_rows = data.draw(st.sampled_from([0, 1, 30, 5000])), data.draw(st.integers(1, 100))
    size = case.batch_size // world_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_ROWS", max_rows)
        patch.setattr(plan_module, "BLOCK_BYTES", 2_000)
        blocks = plan.blocks(world_size, row_bytes, start)
    for number, block in enumerate(blocks):
        rows = (block.stop_step - block.start_step) * size
        assert block.rank == number % world_size
        assert block.start_step < block.stop_step <= plan.num_steps
        assert rows <= max(size, max_rows)
        assert rows * row_bytes <= max(size * row_bytes, 2_000)
    for rank in range(world_size):
        mine = [plan.rank_rows(rank, world_size, b.start_step, b.stop_step) for b in blocks if b.rank == rank]
        assert joined(mine) == [column.tolist() for column in plan.rank_rows(rank, world_size, start, plan.num_steps)]


@given(cases(), st.data())
def test_a_resume_with_another_world_size_has_the_same_batches(case: Case, data: st.DataObject) -> None:
    plan, again = case.plan(), case.plan()
    before, after = (data.draw(st.sampled_from(case.world_sizes)) for _ in range(2))
    stop = data.draw(st.integers(0, plan.num_steps))
    batches = [
        sorted(i for rank in range(world) for i in source.rank_rows(rank, world, step, step + 1)[0].tolist())
        for source, world, steps in ((plan, before, range(stop)), (again, after, range(stop, plan.num_steps)))
        for step in steps
    ]
    assert batches == [sorted(batch) for batch in plan.order.reshape(-1, case.batch_size).tolist()]


@given(cases())
def test_the_hash_distinguishes_plans(case: Case) -> None:
    plan = case.plan()
    assert plan.hash == case.plan().hash
    assert len(plan.hash) == 32
    if plan.num_rows >= 6:
        assert plan.hash != case.plan(epoch=4).hash or plan.order.tolist() == case.plan(epoch=4).order.tolist()
        swapped = plan.order.copy()
        swapped[[0, 1]] = swapped[[1, 0]]
        assert replace(plan, order=swapped).hash != plan.hash
        assert plan.selection is not None
        heavier = replace(plan.selection, weight_values=plan.selection.weight_values * np.float32(1.5))
        assert replace(plan, selection=heavier).hash != plan.hash
        assert replace(plan, num_rows=plan.num_rows - 1).hash != plan.hash


def test_batch_mean_weights_past_the_end_are_those_of_the_plan() -> None:
    selection = replace(Selection.full(13), batch_mean_weights=True)
    plan = Plan.of_selection(selection, 4, 0, 0)
    assert plan.weights(12, 24).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert [rows.size for rows in plan.rank_rows(0, 2, 3, 6)] == [2, 2, 2]


def test_the_hash_does_not_depend_on_the_dtype() -> None:
    plan = Plan.of_selection(Selection.of_ids([0, 2, 3], 5, weights=[1, 2, 1]), 2, seed=0, epoch=0)
    wider = replace(plan, order=plan.order.astype(np.int64))
    big_endian = replace(plan, order=plan.order.astype(">u4"))
    assert plan.hash == wider.hash == big_endian.hash


def test_the_shuffle_is_uniform() -> None:
    selection, num_draws = Selection.full(5), 4_000
    counts_NP = np.zeros((5, 5))
    for seed in range(num_draws):
        counts_NP[np.arange(5), Plan.of_selection(selection, 5, seed, epoch=0).order] += 1
    assert np.abs(counts_NP / num_draws - 0.2).max() < 5 * np.sqrt(0.2 * 0.8 / num_draws)


@pytest.mark.parametrize("seed", [0, 7, 2**33])
@pytest.mark.parametrize("epoch", [0, 5])
def test_the_order_has_a_generator_of_its_own(seed: int, epoch: int) -> None:
    # NumPy pads seeds with zeros: default_rng([seed, epoch, 0]) is the method's generator, default_rng([seed, epoch]).
    order = Plan.of_selection(Selection.full(200), 10, seed, epoch).order
    for purpose in ([], [0], [1], [2], [3]):
        other = np.arange(200, dtype=order.dtype)
        np.random.default_rng([seed, epoch, *purpose]).shuffle(other)
        assert other.tolist() != order.tolist()


def test_padding_is_a_fresh_uniform_draw() -> None:
    counts = np.zeros(100)
    for epoch in range(3_000):
        plan = Plan.of_selection(Selection.of_ids(np.arange(50), 100), 8, seed=0, epoch=epoch)
        counts[plan.order[plan.num_rows :]] += 1
    # Six rows an epoch; ids of the last batch are excluded, so the pruned half comes slightly more often.
    assert counts.min() > 120
    assert counts.max() < 250


def test_in_order_is_ascending_and_padded() -> None:
    plan = Plan.in_order(10, 4, ids=np.array([7, 2, 5, 9, 1]))
    ids, weights, trains = plan.rank_rows(0, 1, 0, plan.num_steps)
    assert ids.tolist()[:5] == [1, 2, 5, 7, 9]
    assert trains.tolist() == [True] * 5 + [False] * 3
    assert weights.tolist() == [1.0] * 5 + [0.0] * 3
    assert Plan.in_order(6, 3).order.tolist() == list(range(6))


def test_a_plan_without_samples_has_no_steps() -> None:
    plan = Plan.in_order(0, 8)
    assert plan.num_steps == plan.num_rows == 0
    assert plan.blocks(2, 100) == []
    assert [column.tolist() for column in plan.rank_rows(1, 2, 0, 0)] == [[], [], []]
    assert plan.hash == Plan.in_order(0, 8).hash


def test_ids_above_two_to_the_24_are_exact() -> None:
    kept = [2**24 - 1, 2**24 + 1, 2**24 + 3, 2**24 + 9]
    plans = [
        Plan.of_selection(Selection.of_ids(kept, 2**24 + 10), 4, seed=0, epoch=0),
        Plan.in_order(2**24 + 10, 4, ids=np.array(kept)),
    ]
    for plan in plans:
        assert sorted(plan.rank_rows(0, 1, 0, 1)[0].tolist()) == kept
        assert plan.rank_rows(0, 1, 0, 1)[0].dtype == np.int64
    assert Plan.in_order(2**40, 1, ids=np.array([2**33 + 1])).rank_rows(0, 1, 0, 1)[0].tolist() == [2**33 + 1]


def test_blocks_stay_below_the_size_that_ray_splits() -> None:
    selection = Selection.full(300_000)
    plan = Plan.of_selection(selection, 512, seed=0, epoch=0)
    for world_size, row_bytes in ((1, 3_073), (4, 3_073), (4, 150_529), (1, 1)):
        blocks = plan.blocks(world_size, row_bytes)
        rows = [(b.stop_step - b.start_step) * 512 // world_size for b in blocks]
        assert sum(rows) == plan.order.size
        assert max(rows) <= 32_768
        assert max(rows) * row_bytes <= max(64 * 1024 * 1024, 512 // world_size * row_bytes)


def test_the_first_blocks_are_small_and_all_respect_max_rows() -> None:
    plan = Plan.of_selection(Selection.full(100_000), 128, seed=0, epoch=0)
    for max_rows in (32_768, 8_192, 512):
        rows = [(b.stop_step - b.start_step) * 64 for b in plan.blocks(2, 1, start_step=3, max_rows=max_rows)]
        assert rows[::2] == rows[1::2], "a span is as long on every rank"
        assert sum(rows) == plan.order.size - 3 * 128
        first = min(1_024, max_rows)
        assert rows[0] == rows[2] == first
        growing = [min(first * 4**number, max_rows) for number in range(len(rows[2::2]))]
        assert rows[2:-2:2] == growing[:-1]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("steps", [(0, 3), (1, 2), (2, 3)])
def test_batch_mean_weights_are_one_scalar_per_batch(world_size: int, steps: tuple[int, int]) -> None:
    weights_N = np.linspace(0.1, 1.0, 10).astype(np.float32)
    own = Selection.of_ids(np.arange(10), 20, weights=weights_N)
    mean = replace(own, batch_mean_weights=True)
    plan = Plan.of_selection(mean, batch_size=4, seed=0, epoch=0)
    start, stop = steps
    for rank in range(world_size):
        _, weights, trains = plan.rank_rows(rank, world_size, start, stop)
        size = 4 // world_size
        for number, step in enumerate(range(start, stop)):
            rows = plan.order[step * 4 : min(step * 4 + 4, 10)]
            mine = slice(number * size, (number + 1) * size)
            expected = weights_N[rows].astype(np.float64).mean()
            np.testing.assert_allclose(weights[mine][trains[mine]], expected, rtol=1e-6)
            assert not weights[mine][~trains[mine]].any()
    assert plan.hash != Plan.of_selection(own, batch_size=4, seed=0, epoch=0).hash
