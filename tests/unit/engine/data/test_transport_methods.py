"""Plan and stream with every method: equal batches, every row once, and valid padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Plan, Selection, Selector
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.transport import LocalStream
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import PlanPass, Push, pack
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.methods import METHODS, build_method, method_fields
from rayprune.sources import SampleSource, Subset, open_data
from rayprune.testing import signals_of
from tests.support.runs import close_epoch, pass_of, stream_pass

DIGITS = open_data("digits").train
EPOCHS = 5
# What a method needs for a run as short as this one.
SHORT = {"trajectory_len": 3, "window_size": 3, "score_epochs": 3, "path": "chosen.parquet"}


def source_of(num_samples: int) -> SampleSource:
    """Return the first digits."""
    return Subset(DIGITS, np.arange(num_samples))


def batches_of(scores: ScoreClient, source: SampleSource, plan_pass: PlanPass, rank: int) -> list[Batch]:
    """Return what one rank is given in a pass."""
    return list(stream_pass(scores, plan_pass, LocalStream({"train": source}), rank))


@pytest.mark.parametrize("name", sorted(METHODS))
@given(
    num_samples=st.integers(1, 300),
    share=st.integers(1, 16),
    world_size=st.integers(1, 4),
    last_batch=st.sampled_from(["pad", "drop"]),
    seed=st.integers(0, 99),
)
def test_ranks_share_every_epoch_of_every_method(
    name: str, num_samples: int, share: int, world_size: int, last_batch: str, seed: int
) -> None:
    batch, source = share * world_size, source_of(num_samples)
    fields = method_fields(METHODS[name])
    config = {"name": name, **{key: value for key, value in SHORT.items() if key in fields}}
    method = build_method(config)
    last_batch = "pad" if method.collect_epochs else last_batch  # such a method misses no sample
    chosen = Selection.of_ids(np.arange(0, num_samples, 2), num_samples)
    run: Any = (config, source, 0, EPOCHS, seed, batch, last_batch, 64, None, 0, True, chosen)
    scores = ScoreClient.in_process(ScoreSpec(*run))
    oracle = Selector(method, num_samples, EPOCHS, seed, source.labels, chosen=chosen)
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        selection = oracle.begin_epoch(epoch)
        plan_pass = pass_of(epoch, "train", world_size)
        given_out = [batches_of(scores, source, plan_pass, rank) for rank in range(world_size)]
        steps = selection.num_kept // batch if last_batch == "drop" else -(-selection.num_kept // batch)
        assert [len(batches) for batches in given_out] == [steps] * world_size
        rows = [b for batches in given_out for b in batches]
        assert all(b.ids.size == share and np.array_equal(b.columns["label"], source.labels[b.ids]) for b in rows)
        ids = np.concatenate([b.ids for b in rows]) if rows else np.empty(0, int)
        real = np.concatenate([b.real for b in rows]) if rows else np.empty(0, bool)
        weights = np.concatenate([b.weights for b in rows]) if rows else np.empty(0)
        trained = np.sort(ids[real])
        if last_batch == "pad":
            assert np.array_equal(trained, selection.ids)
            assert ids.size - trained.size == -selection.num_kept % batch
        else:
            assert trained.size == steps * batch == np.unique(trained).size
            assert np.isin(trained, selection.ids).all()
        assert np.array_equal(weights[real], selection.weights_of(ids[real]))
        assert not weights[~real].any()
        seen = {signal: drawn(rng, signal, trained.size) for signal in method.signals}
        oracle.observe(trained, seen, epoch)
        scores.observe(plan_pass.key, Push(0, 0, *pack(trained, seen)))
        pushes = 1
        if selection.num_scored:
            ids = swept(scores, source, pass_of(epoch, "forward", world_size))
            expected = np.arange(num_samples) if selection.scored_ids is None else selection.scored_ids
            assert np.array_equal(ids, expected)
            seen = {signal: drawn(rng, signal, ids.size) for signal in method.sweep_signals or method.signals}
            oracle.observe(ids, seen, epoch, sweep=True)
            scores.observe(plan_pass.key, Push(0, 1, *pack(ids, seen), sweep=True))
            pushes = 2
        if epoch + 1 < EPOCHS:
            assert close_epoch(scores, plan_pass.key, pushes) is not None


def swept(scores: ScoreClient, source: SampleSource, plan_pass: PlanPass) -> np.ndarray:
    """Return the real ids of a forward-only pass over all ranks, sorted; one that comes twice stands there twice."""
    rows = [b for rank in range(plan_pass.world_size) for b in batches_of(scores, source, plan_pass, rank)]
    return np.sort(np.concatenate([b.ids[b.real] for b in rows]))


def drawn(rng: np.random.Generator, signal: str, rows: int) -> np.ndarray:
    """Return made-up numbers of a signal."""
    if signal in ("probs", "logit_gradient"):
        probs = rng.dirichlet(np.ones(10), rows).astype(np.float32)
        return probs - np.eye(10, dtype=np.float32)[rng.integers(10, size=rows)] * (signal != "probs")
    vector = signals_of((signal,), np.zeros(1, np.int64), 0)[signal].shape[1:]
    return rng.exponential(size=(rows, *vector)).astype(np.float32)


def test_no_samples_give_no_steps() -> None:
    empty = Plan.in_order(0, 8)
    assert (empty.num_steps, empty.blocks(2, 64)) == (0, [])
