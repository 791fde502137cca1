"""Batches are matched with the plan by their ids, whatever a loop does to them before it weighs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rayprune
from rayprune.engine.user_loop.shard import Epoch, Shard
from tests.unit.engine.user_loop.loops import N, X, local_shard

Rows = dict[str, torch.Tensor]
# Shares of an epoch that is never weighed otherwise: each sample's loss is its own number.
VALUES = np.random.default_rng(2).exponential(size=N).astype(np.float32)
COPIES = {
    "itself": lambda batch: batch,
    "shallow": lambda batch: {**batch},
    "cloned": lambda batch: {name: column.clone() for name, column in batch.items()},
    "numpy": lambda batch: {name: column.numpy() for name, column in batch.items()},
    "ids alone": lambda batch: batch["id"].clone(),
    "int32": lambda batch: {"id": batch["id"].to(torch.int32)},
}


def shard_of_values(**changes: Any) -> Shard:
    return local_shard(source={"v": VALUES}, num_epochs=3, **changes)


def joined(batches: list[Rows]) -> Rows:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def taken(batch: Rows, rows: torch.Tensor) -> Rows:
    return {name: column[rows] for name, column in batch.items()}


def pieces(batches: list[Rows], rng: np.random.Generator, sizes: list[int], permute: bool) -> Iterator[Rows]:
    """Yield all rows of the batches in pieces of the sizes, in turn; in another order if asked."""
    whole = joined(batches)
    num = len(whole["id"])
    order = torch.from_numpy(rng.permutation(num)) if permute else torch.arange(num)
    start, turn = 0, 0
    while start < num:
        yield taken(whole, order[start : start + sizes[turn % len(sizes)]])
        start, turn = start + sizes[turn % len(sizes)], turn + 1


def weigh_all(epoch: Epoch, ahead: int, copy: Any, sizes: list[int], permute: bool, seed: int) -> float:
    """Weigh an epoch as a loader would that fetches `ahead` batches and cuts them anew; return Σ weight · loss."""
    rng, waiting, total = np.random.default_rng(seed), deque[Rows](), 0.0

    def weigh(batches: list[Rows]) -> float:
        if not sizes:  # whole batches, in another order
            order = rng.permutation(len(batches)) if permute else np.arange(len(batches))
            return sum(float(epoch.weigh(copy(batches[i]), batches[i]["v"])) * len(batches[i]["v"]) for i in order)
        return sum(
            float(epoch.weigh(copy(piece), piece["v"])) * len(piece["v"])
            for piece in pieces(batches, rng, sizes, permute)
        )

    for batch in epoch.iter_torch_batches(prefetch_batches=seed % 3):
        waiting.append(batch)
        if len(waiting) > ahead:
            total += weigh([waiting.popleft() for _ in range(1 + seed % len(waiting))])
    return total + (weigh(list(waiting)) if waiting else 0.0)


@given(
    ahead=st.integers(0, 12),
    copy=st.sampled_from(sorted(COPIES)),
    sizes=st.lists(st.integers(1, 50), max_size=3),
    permute=st.booleans(),
    seed=st.integers(0, 99),
    last_batch=st.sampled_from(["pad", "drop"]),
)
def test_any_look_ahead_copy_order_and_cut_gives_the_scores_and_sums_of_the_plain_loop(
    ahead: int, copy: str, sizes: list[int], permute: bool, seed: int, last_batch: str
) -> None:
    plain, other = shard_of_values(last_batch=last_batch), shard_of_values(last_batch=last_batch)
    for expected, epoch in zip(plain, other, strict=True):
        assert epoch.plan_hash == expected.plan_hash
        total = sum(float(expected.weigh(batch, batch["v"])) * len(batch["v"]) for batch in expected)
        assert weigh_all(epoch, ahead, COPIES[copy], sizes, permute, seed) == pytest.approx(total, rel=1e-5)
        assert epoch.progress == 1.0
    ours, theirs = other.scores(), plain.scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)
    visited = ours["last_visit"] == 2
    assert np.array_equal(ours["loss"][visited], VALUES[visited])


def test_a_copied_batch_has_the_weights_of_its_own_rows_and_not_of_the_newest_batch() -> None:
    for epoch in shard_of_values():
        batches = list(epoch)
        for batch in reversed(batches):
            expected = (batch["weight"] * batch["v"]).mean()
            assert float(epoch.weigh({**batch, "id": batch["id"].clone()}, batch["v"])) == pytest.approx(
                float(expected)
            )


def of_other_epoch(shard: Shard) -> None:
    epochs = shard.epochs()
    first = next(epochs)
    old = next(iter(first))
    first.weigh(old, old["v"])
    second = next(epochs)
    batches = second.iter_torch_batches()
    fresh = next(batches)
    assert not set(old["id"].tolist()) <= set(fresh["id"].tolist())
    second.weigh(old, old["v"])


def after_its_epoch(shard: Shard) -> None:
    epochs = shard.epochs()
    first = next(epochs)
    batch = next(first.iter_torch_batches())
    next(epochs)
    first.weigh(batch, batch["v"])


def twice(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh(batch, batch["v"])
    epoch.weigh(batch, batch["v"])


def a_row_twice(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh(taken(batch, torch.tensor([0, 1, 1])), torch.ones(3))


def never_given(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh({**batch, "id": batch["id"] + N}, batch["v"])


def without_ids(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh({"v": batch["v"]}, batch["v"])


def a_tuple_that_was_copied(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches(collate_fn=lambda columns: (columns["v"], columns["id"])))
    epoch.weigh(list(batch), torch.from_numpy(batch[0]))


def float_ids(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh({**batch, "id": batch["id"].float()}, batch["v"])


def another_number_of_losses(shard: Shard) -> None:
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh(taken(batch, torch.arange(5)), batch["v"])


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (of_other_epoch, r"ids that do not wait in epoch 1 on rank 0 \("),
        (after_its_epoch, "epoch 0 has ended"),
        (twice, "weighed before"),
        (a_row_twice, "1 of 3 ids that do not wait"),
        (never_given, "32 of 32 ids that do not wait in epoch 0"),
        (without_ids, "dict without ids"),
        (a_tuple_that_was_copied, "give weigh the ids"),
        (float_ids, r"dtype float32: call weigh\(batch, losses\)"),
        (another_number_of_losses, r"shape \(32,\) for a batch of 5"),
    ],
)
def test_wrong_ids_are_refused_at_once_in_one_line(act: Any, words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        act(shard_of_values())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("as_numpy", [False, True])
def test_ids_that_were_permuted_in_place_lead_to_their_own_rows(as_numpy: bool) -> None:
    shard = shard_of_values()
    for epoch in shard:
        for batch in epoch.iter_torch_batches(collate_fn=dict if as_numpy else None):
            order = np.random.default_rng(0).permutation(len(batch["id"]))
            for column in batch.values():
                column[:] = column[order]
            epoch.weigh(batch, torch.as_tensor(batch["v"]))
    visited = shard.scores()["last_visit"] == 2
    assert np.array_equal(shard.scores()["loss"][visited], VALUES[visited])


def test_a_list_of_ids_is_enough() -> None:
    for epoch in (shard := shard_of_values()):
        for batch in epoch:
            epoch.weigh(batch["id"].tolist(), batch["v"])
    assert np.isfinite(shard.scores()["loss"]).all()


def test_a_refused_batch_can_be_weighed_afterwards() -> None:
    epoch = next(shard_of_values().epochs())
    batch = next(epoch.iter_torch_batches())
    for wrong in (batch["v"].mean(), batch["v"][:3], torch.ones(32, 10)):
        with pytest.raises(ValueError, match="weigh"):
            epoch.weigh({**batch, "id": batch["id"].clone()}, wrong)
    assert float(epoch.weigh(batch, batch["v"])) == pytest.approx(float(batch["v"].mean()))


def test_the_ids_of_a_tuple_lead_to_its_rows() -> None:
    shard = shard_of_values()
    for epoch in shard:
        pairs = [*epoch.iter_torch_batches(collate_fn=lambda columns: (columns["v"], columns["id"]))]
        for values, ids in pairs[::-1]:
            epoch.weigh(ids, torch.from_numpy(values))
    assert np.array_equal(shard.scores()["loss"], VALUES)


def test_batches_without_ids_are_known_by_themselves() -> None:
    shard = shard_of_values()
    for epoch in shard:
        batches = [*epoch.iter_torch_batches(collate_fn=lambda columns: (columns["v"].copy(), "text"))]
        for batch in batches[::-1]:
            epoch.weigh(batch, torch.from_numpy(batch[0]))
    assert np.isfinite(shard.scores()["loss"]).all()


def test_a_loop_that_never_weighs_keeps_a_bounded_number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayprune.engine.user_loop import unweighed

    monkeypatch.setattr(unweighed, "_MAX_BATCHES", 3)
    epoch = next(shard_of_values().epochs())
    batches = [*epoch]
    for batch in batches[-3:]:
        epoch.weigh(batch, batch["v"])
    with pytest.raises(ValueError, match="do not wait"):
        epoch.weigh(batches[0], batches[0]["v"])


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_state_of_a_loop_that_fetches_ahead_continues_after_the_newest_weighed_batch(ahead: int) -> None:
    def run(shard: Shard, stop: tuple[int, int] | None) -> tuple[list[Any], dict[str, Any]]:
        weighed = []
        for epoch in shard:
            waiting = deque[Rows]()
            batches = iter(epoch)
            while True:
                while len(waiting) <= ahead and (batch := next(batches, None)) is not None:
                    waiting.append(batch)
                if not waiting:
                    break
                batch = {name: column.clone() for name, column in waiting.popleft().items()}
                weighed.append((epoch.index, batch["id"].tolist(), float(epoch.weigh(batch, batch["v"]))))
                if (epoch.index, int(epoch.progress * epoch.num_steps + 0.5)) == stop:
                    return weighed, shard.state_dict()
        return weighed, {}

    whole, _ = run(shard_of_values(), None)
    last = sum(index == 2 for index, *_ in whole) - 1
    for stop in ((0, 1), (1, 4), (2, last)):  # in the last one, the loader has already fetched everything
        first, state = run(shard_of_values(), stop)
        assert (state["epoch"], state["step"]) == stop
        again = shard_of_values()
        again.load_state_dict(state)
        assert first + run(again, None)[0] == whole


def test_a_state_between_the_parts_of_a_batch_is_refused() -> None:
    shard = shard_of_values()
    epoch = next(shard.epochs())
    batch = next(epoch.iter_torch_batches())
    epoch.weigh(taken(batch, torch.arange(8)), batch["v"][:8])
    with pytest.raises(rayprune.UsageError, match="only a part of the newest batch"):
        shard.state_dict()
    epoch.weigh(taken(batch, torch.arange(8, 32)), batch["v"][8:])
    assert shard.state_dict()["step"] == 1


def test_vector_signals_of_joined_batches_fit_the_buffer() -> None:
    """The recorder's buffer is sized by the first batch, and a later one may have more rows."""
    method = rayprune.build_method({"name": "tdds", "trajectory_len": 3, "window_size": 3})
    shards = [local_shard(method=method, num_epochs=4) for _ in range(2)]
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 2)
    for number, shard in enumerate(shards):
        for epoch in shard:
            batches = [*epoch]
            if number:
                batches = [
                    taken(batches[0], torch.arange(2)),
                    joined([taken(batches[0], torch.arange(2, 32)), *batches[1:]]),
                ]
            for batch in batches:
                logits = model(batch["x"])
                epoch.weigh(batch, logits.sum(1), logits=logits)
    ours, theirs = shards[1].scores(), shards[0].scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)
    assert X.shape == (N, 5)
