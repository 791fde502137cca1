"""Meta batches: their position, their rows, and that the batches of the selection do not change.

Shapes: N samples, GB the global batch, K batches from one meta batch to the next, W ranks.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Plan, Selection
from rayprune.core.plan import META, PADDING, TRAIN, is_meta, train_step_of

NUM, BATCH = 120, 12


def selection(share: float, seed: int = 0, num: int = NUM) -> Selection:
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(num, size=int(share * num), replace=False))
    return Selection.of_ids(ids, num, weights=rng.choice([0.5, 2.0], size=ids.size))


def plan_of(chosen: Selection, every: int, **keys: object) -> Plan:
    return Plan.of_selection(chosen, BATCH, 7, 3, meta_every=every, **keys)  # type: ignore[arg-type]


@given(st.floats(0.05, 0.95), st.integers(1, 5), st.integers(0, 2**30))
def test_meta_batches_do_not_change_the_other_batches(share: float, every: int, seed: int) -> None:
    chosen = selection(share, seed)
    plan, plain = plan_of(chosen, every), plan_of(chosen, 0)
    metas = np.array([is_meta(step, every) for step in range(plan.num_steps)])
    rows = plan.order.reshape(-1, BATCH)
    assert np.array_equal(rows[~metas].ravel(), plain.order)
    assert metas.sum() == -(-plain.num_steps // every)
    assert metas[0]
    assert not metas[-1]
    roles = plan.roles(np.arange(plan.order.size)).reshape(-1, BATCH)
    assert (roles[metas] == META).all()
    assert np.array_equal(roles[~metas].ravel(), plain.roles(np.arange(plain.order.size)))
    weights = plan.weights(0, plan.order.size).reshape(-1, BATCH)
    assert not weights[metas].any()
    assert np.array_equal(weights[~metas].ravel(), plain.weights(0, plain.order.size))
    train_steps = [train_step_of(step, every) for step in np.flatnonzero(~metas)]
    assert train_steps == list(range(plain.num_steps))


def test_every_sample_is_a_meta_row_once_before_any_is_again() -> None:
    chosen = selection(0.9)
    plan = plan_of(chosen, 1)
    meta = plan.order[plan.roles(np.arange(plan.order.size)) == META]
    assert meta.size == 9 * BATCH
    assert np.unique(meta).size == meta.size
    pruned = np.setdiff1d(np.arange(NUM), chosen.ids)
    assert np.intersect1d(meta, pruned).size > 0
    # 9 kept rows padded to 12 need 12 meta rows of 10 samples: all samples once, and then two again.
    small = Plan.of_selection(selection(0.9, num=10), 4, 0, 0, meta_every=1)
    meta = small.order[small.roles(np.arange(small.order.size)) == META]
    assert np.array_equal(np.sort(meta[:10]), np.arange(10))
    assert np.unique(meta[10:]).size == 2


def test_full_selections_and_default_plans_have_no_meta_batches() -> None:
    assert plan_of(Selection.full(NUM), 2).meta_every == 0
    assert plan_of(selection(0.5), 0).meta_every == 0
    assert plan_of(selection(0.5), 2).hash != plan_of(selection(0.5), 0).hash


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_meta_batches_are_split_among_ranks_like_others(world_size: int) -> None:
    plan = plan_of(selection(0.5), 2)
    parts = [plan.rank_rows(rank, world_size, 0, plan.num_steps) for rank in range(world_size)]
    for step in range(plan.num_steps):
        each = BATCH // world_size
        rows = slice(step * each, (step + 1) * each)
        ids = np.concatenate([part[0][rows] for part in parts])
        trains = np.concatenate([part[2][rows] for part in parts])
        assert np.array_equal(ids, plan.order[step * BATCH : (step + 1) * BATCH])
        roles = plan.roles(np.arange(step * BATCH, (step + 1) * BATCH))
        assert set(roles) <= ({META} if is_meta(step, 2) else {TRAIN, PADDING})
        assert np.array_equal(trains, roles == TRAIN)


def test_windows_end_at_the_same_batches_of_the_selection() -> None:
    groups = np.arange(0, NUM + 1, 5)
    chosen = selection(0.6)
    plain, plan = (plan_of(chosen, every, groups=groups, window_rows=40) for every in (0, 2))
    assert plan.window_stops.size == plain.window_stops.size > 1
    before = [[train_step_of(int(stop) // BATCH, 2) for stop in plan.window_stops[:-1]]]
    assert before == [[int(stop) // BATCH for stop in plain.window_stops[:-1]]]
    assert plan.window_stops[-1] == plan.order.size
    joined = np.concatenate([plan.rank_rows(b.rank, 2, b.start_step, b.stop_step)[0] for b in plan.blocks(2, 1)])
    assert np.array_equal(np.sort(joined), np.sort(plan.order))
