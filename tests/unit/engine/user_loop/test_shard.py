"""Epochs, weights, recording and states of a custom training loop, in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

import rayprune
from rayprune.core import Plan, Selector
from rayprune.core.plan import block_rows
from rayprune.sources import open_data
from tests.support.paths import USER_CODE
from tests.unit.engine.user_loop.loops import BATCH, DATA, EPOCHS, METHOD, Loop, N, X, local_shard


@pytest.fixture(scope="module")
def whole() -> Loop:
    return Loop(local_shard()).run()


def test_batches_follow_the_plans_of_a_selector(whole: Loop) -> None:
    """A Selector that observes the losses of the loop makes the same plans."""
    selector = Selector(METHOD, N, EPOCHS, seed=0)
    for epoch in range(EPOCHS):
        selection = selector.begin_epoch(epoch)
        plan = Plan.of_selection(selection, BATCH, 0, epoch)
        assert whole.hashes[epoch] == plan.hash
        mine = [batch[1:] for batch in whole.batches if batch[0] == epoch]
        ids, weights, losses = (list(chain.from_iterable(column)) for column in zip(*mine, strict=True))
        planned, planned_weights, real = plan.rank_rows(0, 1, 0, plan.num_steps)
        assert ids == planned.tolist()
        assert weights == planned_weights.tolist()
        selector.observe(planned[real], {"loss": np.array(losses, dtype=np.float32)[real]}, epoch)


def test_pruning_happens_and_scores_are_those_of_the_last_visit(whole: Loop) -> None:
    scores = whole.shard.scores()
    assert scores["loss"].shape == (N,)
    assert np.isfinite(scores["loss"]).all()
    assert 0 < (scores["times_pruned"] > 0).mean() < 1
    visited = {
        sample
        for index, ids, weights, _ in whole.batches
        for sample, w in zip(ids, weights, strict=True)
        if index == EPOCHS - 1 and w > 0
    }
    assert set(np.flatnonzero(scores["last_visit"] == EPOCHS - 1).tolist()) == visited


@pytest.mark.parametrize("stop", [(0, 1), (0, 10), (2, 3), (4, 1)])
def test_a_restored_loop_continues_exactly(stop: tuple[int, int], tmp_path: Path, whole: Loop) -> None:
    first = Loop(local_shard())
    first.run(stop, lambda: torch.save(first.state(), tmp_path / "state.pt"))
    again = Loop(local_shard())
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    again.run()
    assert first.batches + again.batches == whole.batches
    assert torch.equal(again.model.weight, whole.model.weight)
    ours, theirs = again.shard.scores(), whole.shard.scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)


def test_a_state_after_the_last_batch_is_at_the_start_of_the_next_epoch(whole: Loop) -> None:
    shard = local_shard()
    loop, state = Loop(shard), {}
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            loss = epoch.weigh(batch, cross_entropy(loop.model(batch["x"]), batch["label"], reduction="none"))
            loop.optimizer.zero_grad()
            loss.backward()
            loop.optimizer.step()
        state = shard.state_dict()
        assert (state["epoch"], state["step"]) == (epoch.index + 1, 0)
    assert torch.equal(loop.model.weight, whole.model.weight)
    done = local_shard()
    done.load_state_dict(state)
    assert list(done.epochs()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 16}, "batch_size 32 → 16"),
        ({"seed": 1}, "seed 0 → 1"),
        ({"source": {"x": X}}, "fingerprint"),
        ({"method": rayprune.InfoBatch(prune_ratio=0.3)}, "method"),
    ],
)
def test_a_state_of_another_run_is_refused_with_the_difference(changes: dict[str, Any], words: str) -> None:
    first, state = Loop(local_shard()), {}
    first.run((1, 2), lambda: state.update(first.shard.state_dict()))
    other = local_shard(**changes)

    def load() -> None:
        other.load_state_dict(state)
        next(other.epochs())

    with pytest.raises(ValueError, match=words):
        load()


def test_the_weighted_sum_of_an_epoch_is_unbiased() -> None:
    """The weighted sum over an epoch estimates the sum over all samples."""
    values = np.random.default_rng(1).exponential(size=N).astype(np.float32)
    totals = []
    for seed in range(40):
        shard = local_shard(source={"v": values}, seed=seed, num_epochs=2)
        for epoch in shard.epochs():
            total = 0.0
            for batch in epoch.iter_torch_batches():
                total += float(epoch.weigh(batch, batch["v"])) * BATCH
        totals.append(total)
        assert epoch.num_kept < N
    error = np.std(totals) / np.sqrt(len(totals))
    assert abs(np.mean(totals) - values.sum()) < 4 * error


def test_a_sweep_scores_the_samples_that_were_left_out() -> None:
    method = rayprune.build_method({"name": f"{USER_CODE}:LowerHalf", "looks": 7})
    shard = local_shard(method=method, num_epochs=2)
    swept, scored = [], []
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))
        scored.append(shard.sweep(lambda batch: swept.append(batch["id"]) or batch["x"].sum(1)))
    assert scored == [0, 7]
    assert set(torch.cat(swept).tolist()) >= set(range(N - 7, N))
    assert (shard.scores()["last_visit"][-7:] == 1).all()


def weigh_twice(epoch: Any, batch: Any) -> None:
    epoch.weigh(batch, batch["x"].sum(1))
    epoch.weigh(batch, batch["x"].sum(1))


MISUSES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "twice": (weigh_twice, "were weighed before"),
    "logits": (
        lambda epoch, batch: epoch.weigh(batch, batch["x"][:, :2]),
        r"\(32, 2\) numbers for 32 samples, which could",
    ),
    "wrong axis": (
        lambda epoch, batch: epoch.weigh(batch, batch["x"], token_axis=(1, 2)),
        "name all axes but the first",
    ),
    "scalar": (lambda epoch, batch: epoch.weigh(batch, batch["x"].sum()), "reduction='none'"),
    "again": (lambda epoch, batch: next(epoch.iter_torch_batches()), "iterated already: iterate each one once"),
}


@pytest.mark.parametrize("kind", MISUSES)
def test_misuse_is_explained(kind: str) -> None:
    act, words = MISUSES[kind]
    epoch = next(local_shard().epochs())
    batch = next(epoch.iter_torch_batches())
    with pytest.raises((ValueError, RuntimeError), match=words):
        act(epoch, batch)


def test_a_loop_that_skips_weigh_or_batches_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for epoch in local_shard(num_epochs=2).epochs():
        for batch in epoch.iter_torch_batches():
            if epoch.index == 0:
                epoch.weigh(batch, batch["x"].sum(1))
            if epoch.step == 3:
                break
    assert "epoch 0 ended after 3 of 10 batches" in caplog.text
    assert "epoch 1: weigh was called for 0 of 3 batches" in caplog.text


def test_accumulation_autocast_and_compile_do_not_change_the_recorded_losses() -> None:
    def losses(kind: str) -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        shard, model = local_shard(num_epochs=2), torch.nn.Linear(5, 2)
        forward: Any = torch.compile(model, backend="eager") if kind == "compile" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in shard.epochs():
            for batch in epoch.iter_torch_batches():
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                    logits = forward(batch["x"])
                loss = epoch.weigh(batch, cross_entropy(logits.float(), batch["label"], reduction="none"))
                (loss / 2).backward()
                if epoch.step % 2 == 0 or epoch.step == epoch.num_steps:
                    optimizer.step()
                    optimizer.zero_grad()
        return shard.scores()

    plain = losses("plain")
    assert np.array_equal(losses("compile")["loss"], plain["loss"])
    assert np.allclose(losses("autocast")["loss"], plain["loss"], atol=0.05)


def test_row_groups_are_shuffled_in_windows_as_in_a_run_of_the_engine(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "label": DATA["label"]})
    rows.to_parquet(tmp_path / "train.parquet", row_group_size=5)
    source = open_data("parquet", path=str(tmp_path), cache="none", validation_fraction=0.0).train
    assert source.groups is not None
    shard = local_shard(source=source, num_epochs=2)
    epoch = next(shard.epochs())
    plan = Plan.of_selection(
        Selector(METHOD, N, 2, seed=0).begin_epoch(0),
        BATCH,
        0,
        0,
        groups=source.groups,
        window_rows=block_rows(source.schema.row_bytes),
    )
    assert epoch.plan_hash == plan.hash
    for batch in epoch.iter_torch_batches():
        ids = batch["id"].numpy()
        assert np.array_equal(batch["features"].numpy(), X[ids, :2])
        epoch.weigh(batch, batch["features"].sum(1))
    cached = open_data("parquet", path=str(tmp_path), cache="memory", validation_fraction=0.0).train
    other = local_shard(source=cached, num_epochs=2)
    with pytest.raises(ValueError, match="shuffle"):
        other.load_state_dict(shard.state_dict())


def test_a_state_before_weigh_is_refused() -> None:
    shard = local_shard()
    epoch = next(shard.epochs())
    next(epoch.iter_torch_batches())
    with pytest.raises(RuntimeError, match="after weigh: the state would lack"):
        shard.state_dict()


def test_a_finished_run_is_restored_with_its_scores(whole: Loop) -> None:
    state = {"data": whole.shard.state_dict()}
    again = local_shard()
    again.load_state_dict(state["data"])
    assert list(again.epochs()) == []
    ours, theirs = again.scores(), whole.shard.scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)
    once_more = again.state_dict()
    assert (once_more["epoch"], once_more["step"]) == (EPOCHS, 0)
    assert all(torch.equal(once_more["selector"][name], value) for name, value in state["data"]["selector"].items())


def test_boundary_distances_need_the_last_layer() -> None:
    @dataclass(frozen=True)
    class OfBoundaries(rayprune.Method):
        signals = ("boundary",)

        def select(self, table: Any, context: Any) -> Any:
            num = context.num_samples
            return rayprune.Selection.of_ids(np.arange(num - 7), num, forward_only_ids=np.arange(num - 7, num))

    model, shard = torch.nn.Linear(5, 2), local_shard(method=OfBoundaries(), num_epochs=1)
    given = {"losses": torch.zeros(BATCH), "head": model}
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            logits = model(batch["x"])
            losses = cross_entropy(logits, batch["label"], reduction="none")
            with pytest.raises(ValueError, match=r"needs boundary: give weigh\(head=model.fc\)"):
                epoch.weigh(batch, losses, logits=logits)
            epoch.weigh(batch, losses, logits=logits, head=model)
        assert shard.sweep(lambda batch: {**given, "logits": model(batch["x"])}) == 7
    with torch.no_grad():
        gaps = model(torch.from_numpy(X)).diff(dim=1).abs().squeeze(1) / model.weight.diff(dim=0).norm()
    np.testing.assert_allclose(shard.scores()["boundary"], gaps, rtol=1e-4, atol=1e-6)


def test_a_state_at_the_last_step_still_allows_the_sweep() -> None:
    reference = f"{USER_CODE}:LowerHalf"
    shard = local_shard(method=rayprune.build_method({"name": reference, "looks": 7}), num_epochs=3)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))
            state = shard.state_dict()
        assert (state["epoch"], state["step"]) == (epoch.index, epoch.num_steps)
        assert shard.sweep(lambda batch: batch["x"].sum(1)) == (7 if epoch.index == 1 else 0)
        assert shard.state_dict()["epoch"] == epoch.index + 1


def test_two_states_at_one_step_are_equal_and_the_loop_continues(whole: Loop) -> None:
    loop, states = Loop(local_shard()), []
    loop.run((1, 2), lambda: states.extend(loop.shard.state_dict() for _ in range(2)))
    first, second = states
    assert (first["epoch"], first["step"]) == (second["epoch"], second["step"]) == (1, 2)
    assert first["selector"].keys() == second["selector"].keys()
    assert all(torch.equal(first["selector"][name], second["selector"][name]) for name in first["selector"])

    shard = local_shard(num_epochs=2)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))
            if epoch.step == 2:
                assert shard.state_dict()["step"] == shard.state_dict()["step"] == 2
        assert epoch.step == epoch.num_steps


def test_the_shard_and_the_epoch_can_be_iterated_themselves(whole: Loop) -> None:
    shard = local_shard()
    ids = [
        (int(epoch), batch["id"].tolist())
        for epoch in shard
        for batch in epoch
        if epoch.weigh(batch, batch["x"].sum(1)) is not None
    ]
    assert ids[:10] == [(index, ids) for index, ids, *_ in whole.batches][:10]
    assert sorted({index for index, _ in ids}) == list(range(EPOCHS))
    with pytest.raises(RuntimeError, match="iterated once"):
        next(iter(shard))


def test_progress_is_the_fraction_of_planned_visits() -> None:
    shard, seen = local_shard(), []
    assert shard.progress == 0.0
    for epoch in shard:
        assert shard.progress == pytest.approx(epoch.index / EPOCHS)
        for number, batch in enumerate(epoch):
            before = epoch.progress
            epoch.weigh(batch, batch["x"].sum(1))
            assert (before, epoch.progress) == pytest.approx((number / epoch.num_steps, (number + 1) / epoch.num_steps))
            seen.append(shard.progress)
    assert min(len(seen), EPOCHS * 10) == len(seen) < EPOCHS * 10, "pruned epochs are shorter"
    assert seen == sorted(seen)
    assert seen[-1] == shard.progress == 1.0


def test_progress_goes_on_after_a_resume_and_without_weigh() -> None:
    first, state = Loop(local_shard()), {}
    first.run((1, 3), lambda: state.update(first.shard.state_dict()))
    again = local_shard()
    again.load_state_dict(state)
    epoch = next(again.epochs())
    assert epoch.progress == pytest.approx(3 / epoch.num_steps)
    assert again.progress == first.shard.progress
    careless = local_shard(method=rayprune.Full())
    for epoch in careless:
        steps = [epoch.progress * epoch.num_steps for _ in epoch]
        # The first epoch cannot know that nothing will be weighed.
        assert steps == pytest.approx([0.0] * epoch.num_steps if epoch.index == 0 else range(epoch.num_steps))
    assert careless.progress == 1.0


@pytest.mark.parametrize("method", [METHOD, rayprune.Full()], ids=["infobatch", "full"])
def test_progress_does_not_jump_with_a_loader_that_fetches_ahead(method: rayprune.Method) -> None:
    for epoch in (shard := local_shard(method=method, num_epochs=3)):
        seen = []
        for batch in list(epoch):
            seen.append(epoch.progress)
            epoch.weigh(batch, batch["x"].sum(1))
        assert seen == pytest.approx([step / epoch.num_steps for step in range(epoch.num_steps)])
    assert shard.progress == 1.0


def test_progress_of_a_loaded_state_is_that_of_the_saved_run() -> None:
    first, state = Loop(local_shard()), {}
    first.run((1, 3), lambda: state.update(first.shard.state_dict()))
    again = local_shard()
    again.load_state_dict(state)
    assert again.progress == first.shard.progress > 0.2
    next(again.epochs())
    assert again.progress == first.shard.progress


def test_a_sweep_before_the_last_batch_is_refused() -> None:
    method = rayprune.build_method({"name": f"{USER_CODE}:LowerHalf", "looks": 7})
    shard = local_shard(method=method, num_epochs=2)
    for epoch in shard:
        batches = iter(epoch)
        first = next(batches)
        if epoch.index == 1:
            with pytest.raises(rayprune.UsageError, match="call sweep after the epoch's batches"):
                shard.sweep(lambda batch: batch["x"].sum(1))
        for batch in (first, *batches):
            epoch.weigh(batch, batch["x"].sum(1))
    assert shard.progress == 1.0


def test_one_of_several_processes_is_told_to_use_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = local_shard()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (local_shard, lambda: next(shard.epochs())):
        with pytest.raises(ValueError, match="local_loader is for one process, and here 2 train together"):
            call()


def test_a_state_that_skips_batches_warns(caplog: pytest.LogCaptureFixture) -> None:
    shard = local_shard()
    batches = list(epoch := next(shard.epochs()))
    epoch.weigh(batches[2], batches[2]["x"].sum(1))
    assert shard.state_dict()["step"] == 3
    assert "2 batches that were not weighed and come before one that was" in caplog.text
