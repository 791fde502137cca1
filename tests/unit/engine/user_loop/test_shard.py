"""A training loop of one's own, in this process: the epochs, weights and recording of an engine's run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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
from rayprune.engine.user_loop.shard import Shard
from rayprune.sources import open_data
from tests.support.paths import USER_CODE

N, EPOCHS, BATCH = 301, 5, 32
X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
DATA = {"x": X, "label": (X[:, 0] > 0).astype(np.int64)}
METHOD = rayprune.InfoBatch(prune_ratio=0.5, anneal_start=1.0)
# (epoch, ids, weights, losses) of each batch
Batches = list[tuple[int, list[int], list[float], list[float]]]


def make(**changes: Any) -> Shard:
    return rayprune.local_loader(
        **{"source": DATA, "method": METHOD, "num_epochs": EPOCHS, "batch_size": BATCH, **changes}
    )


class Loop:
    """A small classifier trained by hand; what it saw is kept."""

    def __init__(self, shard: Shard) -> None:
        torch.manual_seed(0)
        self.shard, self.model = shard, torch.nn.Linear(5, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.seen: Batches = []
        self.hashes: dict[int, str] = {}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data": self.shard.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.shard.load_state_dict(state["data"])

    def run(self, stop: tuple[int, int] | None = None, save: Callable[[], None] | None = None) -> Loop:
        for epoch in self.shard.epochs():
            self.hashes[epoch.index] = epoch.plan_hash
            for batch in epoch.iter_torch_batches():
                losses = cross_entropy(self.model(batch["x"]), batch["label"], reduction="none")
                loss = epoch.weigh(batch, losses)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.seen.append((epoch.index, batch["id"].tolist(), batch["weight"].tolist(), losses.tolist()))
                if (epoch.index, epoch.step) == stop:
                    assert save is not None
                    save()
                    return self
        return self


@pytest.fixture(scope="module")
def whole() -> Loop:
    return Loop(make()).run()


def test_batches_are_the_plans_of_the_selector(whole: Loop) -> None:
    """What the loop saw is what Selector and Plan say for the losses that it had."""
    selector = Selector(METHOD, N, EPOCHS, seed=0)
    for epoch in range(EPOCHS):
        selection = selector.begin_epoch(epoch)
        plan = Plan.of_selection(selection, BATCH, 0, epoch)
        assert whole.hashes[epoch] == plan.hash
        mine = [batch[1:] for batch in whole.seen if batch[0] == epoch]
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
        for index, ids, weights, _ in whole.seen
        for sample, w in zip(ids, weights, strict=True)
        if index == EPOCHS - 1 and w > 0
    }
    assert set(np.flatnonzero(scores["last_visit"] == EPOCHS - 1).tolist()) == visited


@pytest.mark.parametrize("stop", [(0, 1), (0, 10), (2, 3), (4, 1)])
def test_a_state_inside_any_epoch_goes_on_exactly(stop: tuple[int, int], tmp_path: Path, whole: Loop) -> None:
    first = Loop(make())
    first.run(stop, lambda: torch.save(first.state(), tmp_path / "state.pt"))
    again = Loop(make())
    again.load(torch.load(tmp_path / "state.pt", weights_only=True))
    again.run()
    assert first.seen + again.seen == whole.seen
    assert torch.equal(again.model.weight, whole.model.weight)
    ours, theirs = again.shard.scores(), whole.shard.scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)


def test_a_state_after_the_last_batch_is_the_next_epochs_start(whole: Loop) -> None:
    shard = make()
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
    done = make()
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
def test_a_state_of_another_run_is_refused_with_what_differs(changes: dict[str, Any], words: str) -> None:
    first, state = Loop(make()), {}
    first.run((1, 2), lambda: state.update(first.shard.state_dict()))
    other = make(**changes)

    def load() -> None:
        other.load_state_dict(state)
        next(other.epochs())

    with pytest.raises(ValueError, match=words):
        load()


def test_forms_of_batches() -> None:
    for device, dtypes, expected in (
        (None, None, torch.float32),
        ("cpu", torch.float64, torch.float64),
        ("auto", {"x": torch.bfloat16}, torch.bfloat16),
    ):
        batch = next(next(make().epochs()).iter_torch_batches(device=device, dtypes=dtypes))
        assert batch["x"].dtype == expected
        assert batch["label"].dtype == torch.int64
        assert (batch["id"].dtype, batch["weight"].dtype) == (torch.int64, torch.float32)
        assert batch["x"].shape == (BATCH, 5)


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_collate_function_gets_the_columns_and_its_batch_can_be_weighed(ahead: int) -> None:
    epoch = next(make().epochs())
    seen = 0
    pairs = epoch.iter_torch_batches(
        collate_fn=lambda columns: (torch.from_numpy(columns["x"]), columns["id"]), prefetch_batches=ahead
    )
    for batch in pairs:
        inputs, ids = batch
        assert np.array_equal(inputs.numpy(), X[ids])
        epoch.weigh(batch, inputs.abs().sum(1))
        seen += 1
    assert seen == epoch.num_steps == len(epoch)


def test_the_weighted_sum_of_an_epoch_is_unbiased() -> None:
    """Summed over an epoch, weigh gives the mean over the plan: kept samples stand for those left out."""
    values = np.random.default_rng(1).exponential(size=N).astype(np.float32)
    totals = []
    for seed in range(40):
        shard = make(source={"v": values}, seed=seed, num_epochs=2)
        for epoch in shard.epochs():
            total = 0.0
            for batch in epoch.iter_torch_batches():
                total += float(epoch.weigh(batch, batch["v"])) * BATCH
        totals.append(total)
        assert epoch.num_kept < N
    error = np.std(totals) / np.sqrt(len(totals))
    assert abs(np.mean(totals) - values.sum()) < 4 * error


def test_samples_left_out_are_swept() -> None:
    method = rayprune.build_method({"name": f"{USER_CODE}:LowerHalf", "looks": 7})
    shard = make(method=method, num_epochs=2)
    assert_all, scored = [], []
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))
        scored.append(shard.sweep(lambda batch: assert_all.append(batch["id"]) or batch["x"].sum(1)))
    assert scored == [0, 7]
    assert set(torch.cat(assert_all).tolist()) >= set(range(N - 7, N))
    assert (shard.scores()["last_visit"][-7:] == 1).all()


def misuse(epoch: Any, batch: Any) -> None:
    epoch.weigh(batch, batch["x"].sum(1))
    epoch.weigh(batch, batch["x"].sum(1))


MISUSES: dict[str, tuple[Callable[[Any, Any], None], str]] = {
    "twice": (misuse, "called once for it"),
    "another batch": (lambda epoch, batch: epoch.weigh({**batch}, batch["x"].sum(1)), "yielded last"),
    "scalar": (lambda epoch, batch: epoch.weigh(batch, batch["x"].sum()), "reduction='none'"),
    "again": (lambda epoch, batch: next(epoch.iter_torch_batches()), "iterated already"),
}


@pytest.mark.parametrize("kind", MISUSES)
def test_misuse_is_explained(kind: str) -> None:
    act, words = MISUSES[kind]
    epoch = next(make().epochs())
    batch = next(epoch.iter_torch_batches())
    with pytest.raises((ValueError, RuntimeError), match=words):
        act(epoch, batch)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size 0 must be"),
        ({"num_epochs": 0}, "num_epochs 0"),
        ({"method": "infobatch"}, "method must be a rayprune method"),
        ({"method": rayprune.InfoBatch}, "method must be a rayprune method"),
        ({"method": rayprune.InfoBatch(class_floor=0.2), "source": {"x": X}}, "no integer column 'label'"),
        ({"last_batch": "keep"}, "'pad' or 'drop'"),
        ({"last_batch": "drop", "batch_size": 512}, "more than the 301 samples"),
        ({"source": {"x": X, "y": X[:3]}}, "one length"),
        ({"source": {"x": X, "id": np.arange(N)}}, "a name that rayprune adds itself"),
        ({"source": {"x": np.array(["a"] * N)}}, "give numbers"),
        ({"source": {"x": [[1], [1, 2]]}}, "column 'x' is not an array"),
        ({"source": {"x": torch.zeros(3, dtype=torch.bfloat16)}}, "column 'x' is not an array"),
        ({"source": {}}, "no columns"),
        ({"source": {"x": X[:0]}}, "no rows"),
    ],
)
def test_bad_arguments_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_a_loop_that_weighs_nothing_or_stops_early_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for epoch in make(num_epochs=2).epochs():
        for batch in epoch.iter_torch_batches():
            if epoch.index == 0:
                epoch.weigh(batch, batch["x"].sum(1))
            if epoch.step == 3:
                break
    assert "epoch 0 ended after 3 of 10 batches" in caplog.text
    assert "epoch 1: weigh was called for 0 of 3 batches" in caplog.text


def test_accumulation_autocast_and_compile_change_nothing_of_what_is_recorded() -> None:
    def losses(kind: str) -> dict[str, np.ndarray]:
        torch.manual_seed(0)
        shard, model = make(num_epochs=2), torch.nn.Linear(5, 2)
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


def test_rows_that_are_read_in_groups_mix_in_windows_as_in_an_engines_run(tmp_path: Path) -> None:
    rows = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "label": DATA["label"]})
    rows.to_parquet(tmp_path / "train.parquet", row_group_size=5)
    source = open_data("parquet", path=str(tmp_path), cache="none", validation_fraction=0.0).train
    assert source.groups is not None
    shard = make(source=source, num_epochs=2)
    epoch = next(shard.epochs())
    plan = Plan.of_selection(
        Selector(METHOD, N, 2, seed=0).begin_epoch(0),
        BATCH,
        0,
        0,
        "pad",
        source.groups,
        block_rows(source.schema.row_bytes),
    )
    assert epoch.plan_hash == plan.hash
    for batch in epoch.iter_torch_batches():
        ids = batch["id"].numpy()
        assert np.array_equal(batch["features"].numpy(), X[ids, :2])
        epoch.weigh(batch, batch["features"].sum(1))
    cached = open_data("parquet", path=str(tmp_path), cache="memory", validation_fraction=0.0).train
    other = make(source=cached, num_epochs=2)
    with pytest.raises(ValueError, match="shuffle"):
        other.load_state_dict(shard.state_dict())


def test_a_state_before_weigh_is_refused() -> None:
    shard = make()
    epoch = next(shard.epochs())
    next(epoch.iter_torch_batches())
    with pytest.raises(RuntimeError, match="after weigh: the state would lack"):
        shard.state_dict()


def test_a_finished_run_is_restored_with_its_scores(whole: Loop) -> None:
    state = {"data": whole.shard.state_dict()}
    again = make()
    again.load_state_dict(state["data"])
    assert list(again.epochs()) == []
    ours, theirs = again.scores(), whole.shard.scores()
    assert all(np.array_equal(ours[name], theirs[name], equal_nan=True) for name in theirs)
    once_more = again.state_dict()
    assert (once_more["epoch"], once_more["step"]) == (EPOCHS, 0)
    assert all(torch.equal(once_more["selector"][name], value) for name, value in state["data"]["selector"].items())


def test_numpy_numbers_make_states_that_load(tmp_path: Path) -> None:
    shard = make(seed=np.int64(3), num_epochs=np.int64(2), batch_size=np.int64(32))
    loop = Loop(shard)
    loop.run((0, 2), lambda: torch.save(shard.state_dict(), tmp_path / "state.pt"))
    again = make(seed=3, num_epochs=2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert next(again.epochs()).start_step == 2


def test_a_method_of_ones_own_needs_no_name() -> None:
    @dataclass(frozen=True)
    class Half(rayprune.Method):
        signals = ()

        def select(self, table: Any, context: Any) -> Any:
            return rayprune.Selection.of_ids(np.arange(0, context.num_samples, 2), context.num_samples)

    shard = make(method=Half(), num_epochs=2)
    for epoch in shard.epochs():
        assert epoch.num_kept == 151
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))


def test_a_loop_gives_the_layer_whose_boundaries_its_method_asks_for() -> None:
    @dataclass(frozen=True)
    class OfBoundaries(rayprune.Method):
        signals = ("boundary",)

        def select(self, table: Any, context: Any) -> Any:
            num = context.num_samples
            return rayprune.Selection.of_ids(np.arange(num - 7), num, forward_only_ids=np.arange(num - 7, num))

    model, shard = torch.nn.Linear(5, 2), make(method=OfBoundaries(), num_epochs=1)
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


def test_a_sweep_after_a_state_at_the_last_step_is_made() -> None:
    reference = f"{USER_CODE}:LowerHalf"
    shard = make(method=rayprune.build_method({"name": reference, "looks": 7}), num_epochs=3)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))
            state = shard.state_dict()
        assert (state["epoch"], state["step"]) == (epoch.index, epoch.num_steps)
        assert shard.sweep(lambda batch: batch["x"].sum(1)) == (7 if epoch.index == 1 else 0)
        assert shard.state_dict()["epoch"] == epoch.index + 1


def test_what_a_loop_does_to_its_batch_does_not_reach_the_plan() -> None:
    epoch = next(make().epochs())
    for batch in epoch.iter_torch_batches():
        ids = batch["id"].clone()
        batch["weight"].mul_(0)
        batch["id"].zero_()
        assert epoch.weigh(batch, torch.ones(BATCH)) > 0
        assert len(set(ids.tolist())) == BATCH


@pytest.mark.parametrize("form", [{"dtypes": {"nope": torch.float32}}, {"dtypes": torch.float16, "collate_fn": dict}])
def test_a_wrong_form_can_be_corrected(form: dict[str, Any]) -> None:
    epoch = next(make().epochs())
    with pytest.raises(ValueError, match="dtypes"):
        next(epoch.iter_torch_batches(**form))
