"""Plan and stream under every registered method: equal batches, nothing lost or twice, padding within the rules."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Plan, Selector
from rayprune.engine.actor import ScoreSpec
from rayprune.engine.client import LocalScores
from rayprune.engine.protocol import Turn, pack
from rayprune.engine.stream import Batch, LocalStream, plan_batches
from rayprune.methods import METHODS, build_method
from rayprune.sources import SampleSource, Subset, open_data

DIGITS = open_data("digits").train
EPOCHS = 3


def source_of(num_samples: int) -> SampleSource:
    """Return the first digits."""
    return Subset(DIGITS, np.arange(num_samples))


def batches_of(scores: LocalScores, source: SampleSource, turn: Turn, rank: int, batch: int) -> list[Batch]:
    """Return what one rank is given in a turn."""
    header = scores.call("announce", 1, turn)
    return list(plan_batches(scores, 1, turn, header, rank, batch, LocalStream({"train": source})))


@given(
    name=st.sampled_from(sorted(METHODS)),
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
    spec = ScoreSpec({"name": name}, source, 0, EPOCHS, seed, batch, last_batch, 64, None, 0)  # type: ignore[arg-type]
    scores = LocalScores(spec)
    oracle = Selector(build_method(name), num_samples, EPOCHS, seed)
    losses = np.random.default_rng(seed).exponential(size=(EPOCHS, num_samples)).astype(np.float32)
    for epoch in range(EPOCHS):
        selection = oracle.begin_epoch(epoch)
        turn = Turn(epoch, "train", world_size)
        given_out = [batches_of(scores, source, turn, rank, batch) for rank in range(world_size)]
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
        oracle.observe(trained, {"loss": losses[epoch][trained]}, epoch)
        observe(scores, epoch, trained, losses[epoch])
        if epoch + 1 < EPOCHS:
            assert scores.call("close_epoch", 1, epoch, [1]) is not None


def observe(scores: LocalScores, epoch: int, ids: np.ndarray, losses: np.ndarray) -> None:
    """Push what a rank saw."""
    scores.call("observe", 1, epoch, 0, 0, *pack(ids, {"loss": losses[ids]}))


def test_no_samples_are_no_steps() -> None:
    empty = Plan.in_order(0, 8)
    assert (empty.num_steps, empty.blocks(2, 64)) == (0, [])
