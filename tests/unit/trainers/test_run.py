"""A planned run without a trainer: plans, codes, padding, positions, states, the exchange between ranks."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rayprune
from rayprune.core.method import Method
from rayprune.errors import ConfigError, RunFolderError, UsageError
from rayprune.trainers.run import PlannedBatch, PlannedRun, split_ids
from tests.support.plans import expected_epochs

N, EPOCHS, ROWS = 53, 4, 4
METHOD = rayprune.InfoBatch(prune_ratio=0.6, anneal_start=1.0)
# (epoch, step, rank) → (ids, weights)
Visits = dict[tuple[int, int, int], tuple[list[int], list[float]]]


def loss_of(epoch: int, ids: Any) -> Any:
    return np.random.default_rng(epoch).random(N).astype(np.float32)[np.asarray(ids)]


def new_run(method: Method = METHOD, num_epochs: float = EPOCHS, rows: int = ROWS, **options: Any) -> PlannedRun:
    return PlannedRun(method, N, num_epochs, rows, **options)


def train_batches(run: PlannedRun, visits: Visits, stop: int | None = None) -> None:
    """Train the current epoch's batches from the run's position on, up to the step `stop`."""
    for codes in run.codes():
        if run.step == stop:
            return
        batch = run.next_batch()
        assert [code for code in codes if code >= 0] == batch.ids.tolist()
        assert len(codes) == run.batch_rows
        visits[run.epoch, run.step, run.rank] = batch.ids.tolist(), batch.weights.tolist()
        run.record(batch, {"loss": torch.from_numpy(loss_of(run.epoch, batch.ids))})


def train(run: PlannedRun, visits: Visits, stop: tuple[int, int] | None = None) -> None:
    for epoch in range(run.resume_epoch, run.selector.num_epochs):
        run.begin_epoch(epoch)
        train_batches(run, visits, stop[1] if stop and stop[0] == epoch else None)
        if stop and stop[0] == epoch:
            return
        run.end_epoch()


def on_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, work: Callable[[int], None]) -> None:
    """Call `work(rank)` in a thread a rank; the threads meet where processes would exchange objects."""
    barrier, boxes = threading.Barrier(world_size, timeout=20), {}
    rank_of, errors = threading.local(), []

    def all_gather_object(found: list[Any], own: Any) -> None:
        boxes[rank_of.rank] = own
        barrier.wait()
        found[:] = [boxes[rank] for rank in range(world_size)]
        barrier.wait()

    def body(rank: int) -> None:
        rank_of.rank = rank
        try:
            work(rank)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def by_epoch(visits: Visits) -> list[tuple[list[int], list[float]]]:
    epochs: list[tuple[list[int], list[float]]] = [([], []) for _ in range(EPOCHS)]
    for key in sorted(visits):
        epochs[key[0]][0].extend(visits[key][0])
        epochs[key[0]][1].extend(visits[key][1])
    return epochs


def expected(global_rows: int, method: Method = METHOD, **options: Any) -> list[tuple[list[int], list[float]]]:
    selector = rayprune.Selector(method, N, EPOCHS, 0)
    return expected_epochs(
        selector, global_rows, lambda epoch, ids: (ids.tolist(), {"loss": loss_of(epoch, ids)}), **options
    )


@pytest.mark.parametrize("last_batch", ["pad", "drop"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_ranks_together_visit_the_selectors_own_plan(
    monkeypatch: pytest.MonkeyPatch, world_size: int, last_batch: Any
) -> None:
    visits: Visits = {}
    runs = [new_run(rank=rank, world_size=world_size, last_batch=last_batch) for rank in range(world_size)]
    on_ranks(monkeypatch, world_size, lambda rank: train(runs[rank], visits))
    plan = expected(ROWS * world_size, last_batch=last_batch)
    assert by_epoch(visits) == plan
    assert len(plan[1][0]) < N
    for run in runs[1:]:
        np.testing.assert_array_equal(run.selector.scores()["loss"], runs[0].selector.scores()["loss"])
    assert {run.progress for run in runs} == {1.0}


def test_padding_goes_to_the_last_ranks_and_has_no_weight() -> None:
    runs = [PlannedRun(METHOD, 5, 1, 4, rank=rank, world_size=2) for rank in range(2)]
    for run in runs:
        run.begin_epoch(0)
    first, second = (run.next_batch() for run in runs)
    assert (first.ids.size, second.ids.size) == (4, 1)
    assert (first.mean_rows, second.mean_rows) == (2.5, 2.5)
    assert not first.is_plain
    assert sum(code < 0 for code in next(runs[1].codes())) == 3
    empty = PlannedRun(METHOD, 5, 1, 5, rank=1, world_size=2)
    empty.begin_epoch(0)
    assert empty.next_batch().ids.size == 0
    assert all(code < 0 for code in next(empty.codes()))


def test_a_batch_is_plain_only_if_all_its_weights_are_one_on_every_rank() -> None:
    run = new_run()
    visits: Visits = {}
    train(run, visits, stop=(1, 0))
    plain = []
    while run.step < run.num_batches:
        batch = run.next_batch()
        plain.append(batch.is_plain)
        assert batch.is_plain == (batch.ids.size == ROWS and set(batch.weights.tolist()) == {1.0})
        run.record(batch, {"loss": torch.zeros(batch.ids.size)})
    assert not all(plain)


def saved(run: PlannedRun) -> dict[str, Any]:
    """Return the state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    return dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("stop", [(0, 3), (1, 2), (2, 0)])
def test_a_state_goes_on_exactly_where_it_was_saved(stop: tuple[int, int]) -> None:
    whole, before, after = {}, {}, {}
    train(new_run(), whole)
    run = new_run()
    train(run, before, stop)
    resumed = new_run()
    resumed.load_state_dict(saved(run))
    assert resumed.resume_epoch == stop[0]
    train(resumed, after)
    assert before | after == whole
    assert not before.keys() & after.keys()
    assert resumed.progress == 1.0


def test_a_state_after_an_epochs_last_batch_goes_on_with_the_next_epoch() -> None:
    whole, before, after = {}, {}, {}
    train(new_run(), whole)
    run = new_run()
    train(run, before, (1, 10_000))
    assert run.step == run.num_batches
    assert run.next_position == (2, 0)
    resumed = new_run()
    resumed.load_state_dict(saved(run))
    train(resumed, after)
    assert before | after == whole
    assert min(after) == (2, 0, 0)


def test_a_state_goes_on_with_other_processes_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the epoch is the same rows; W·B·A is what it was."""
    whole, before = {}, {}
    train(new_run(rows=8), whole)
    run = new_run(rows=8)
    train(run, before, (1, 2))
    state = saved(run)
    for rows, world_size, accumulation in ((4, 2, 1), (2, 4, 1), (4, 1, 2)):
        after: Visits = {}
        group = {"rows": rows, "world_size": world_size, "accumulation": accumulation}
        runs = [new_run(rank=rank, **group) for rank in range(world_size)]

        def work(rank: int, runs: Any = runs, after: Any = after) -> None:
            runs[rank].load_state_dict(state)
            train(runs[rank], after)

        on_ranks(monkeypatch, world_size, work)
        both = before | {(epoch, step + 1000, rank): value for (epoch, step, rank), value in after.items()}
        assert by_epoch(both) == by_epoch(whole), (rows, world_size)


def test_a_batch_size_that_does_not_divide_the_rows_trained_is_refused() -> None:
    run, other = (PlannedRun(rayprune.Full(), 16, 2, rows) for rows in (8, 9))  # two batches in both
    train(run, {}, (0, 1))
    other.load_state_dict(run.state_dict())
    with pytest.raises(ConfigError, match=r"8 rows into epoch 0, .* batches of 9: .* product divides 8"):
        other.begin_epoch(0)


def test_other_steps_are_refused_because_of_the_learning_rate() -> None:
    with pytest.raises(ConfigError, match=r"of another run \(num_steps \d+ → \d+\)"):
        new_run(rows=8).load_state_dict(new_run(rows=4).state_dict())


def test_states_that_do_not_fit_are_refused() -> None:
    state = new_run().state_dict()
    with pytest.raises(ConfigError, match="not a state of rayprune"):
        new_run().load_state_dict({"model": {}})
    with pytest.raises(ConfigError, match="state of schema 9, this version reads up to 1: upgrade"):
        new_run().load_state_dict({**state, "schema": 9})
    with pytest.raises(ConfigError, match=r"of another run \(num_epochs 4 → 6; seed 0 → 1; num_steps"):
        new_run(num_epochs=6, seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="last_batch 'pad' → 'drop'"):
        new_run(last_batch="drop").load_state_dict(state)
    with pytest.raises(RunFolderError, match="of another run: method"):
        new_run(rayprune.Full()).load_state_dict(state)


def test_exchanging_twice_folds_an_observation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, folded = new_run(), []
    observe = run.selector.observe
    monkeypatch.setattr(run.selector, "observe", lambda ids, *rest: (folded.extend(ids.tolist()), observe(ids, *rest)))
    run.exchange()  # before any epoch
    train(run, {}, (0, 3))
    run.exchange()
    run.exchange()
    assert len(folded) == 3 * ROWS
    train_batches(run, {})
    run.end_epoch()
    run.end_epoch()
    run.state_dict()
    assert sorted(folded) == list(range(N))


def test_batches_that_were_not_weighed_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    run = new_run()
    train(run, {}, (0, 3))
    run.begin_epoch(1)
    assert "epoch 0 ended after 3 of 14 batches" in caplog.text
    caplog.clear()
    half = new_run(num_epochs=0.5)
    train(half, {}, (0, 7))
    half.end_epoch()
    assert half.progress == 1.0
    assert not caplog.records


def test_a_run_may_end_inside_an_epoch() -> None:
    run = new_run(rayprune.Full(), num_epochs=2.5, accumulation=3)
    run.begin_epoch(0)
    assert (run.num_batches, run.num_updates, run.num_full_updates) == (14, 5, 13)
    progress = []
    for epoch in range(3):
        run.begin_epoch(epoch)
        assert run.updates_left == (5 if epoch < 2 else 3)
        for _ in range(run.num_batches if epoch < 2 else 9):
            run.record(run.next_batch(), {"loss": torch.zeros(run.next_batch().ids.size)})
            progress.append(run.progress)
    assert run.updates_left == 0
    assert progress == sorted(progress)
    assert progress[13] == pytest.approx(0.4)
    assert progress[-1] == 1.0
    assert progress[:3] == pytest.approx([0, 0, 0.2 / 2.5]), "an optimizer step is made every three batches"


def test_full_updates_of_a_fixed_subset_are_its_own() -> None:
    assert new_run(rayprune.Random(prune_ratio=0.5)).num_full_updates == 4 * 7
    assert new_run(METHOD).num_full_updates == 4 * 14
    assert new_run(METHOD, last_batch="drop").num_full_updates == 4 * 13


def test_a_selection_file_is_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "chosen.txt"
    path.write_text("1\n5\n40\n")
    run = new_run(rayprune.Fixed(path=str(path)))
    visits: Visits = {}
    train(run, visits)
    assert [sorted(ids) for ids, _ in by_epoch(visits)] == [[1, 5, 40]] * EPOCHS
    with pytest.raises(ConfigError, match="Fixed needs a file of samples: give path="):
        new_run(rayprune.Fixed())


def test_weigh_returns_the_weighted_mean_and_records(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run()
    train(run, {}, (1, 0))
    batch = run.next_batch()
    losses = torch.arange(1.0, 5.0, requires_grad=True)
    mean = run.weigh({"id": batch.ids, "label": torch.zeros(4)}, losses)
    assert mean.item() == pytest.approx((batch.weights * [1, 2, 3, 4]).sum() / 4)
    mean.backward()
    assert torch.equal(losses.grad, torch.from_numpy(batch.weights) / 4)
    run.exchange()
    assert run.selector.scores()["loss"][batch.ids].tolist() == [1, 2, 3, 4]
    with pytest.raises(UsageError, match=r"epoch 1, batch 1, rank 0: the trainer brought ids \["):
        run.weigh((torch.zeros(4), batch.ids), losses)


def test_a_rank_of_padding_weighs_zero_and_keeps_the_graph() -> None:
    run = PlannedRun(METHOD, 5, 1, 5, rank=1, world_size=2)
    run.begin_epoch(0)
    losses = torch.ones(1, requires_grad=True)
    loss = run.weigh((np.array([~3]),), losses)
    loss.backward()
    assert loss.item() == 0
    assert losses.grad.item() == 0
    assert run.step == 1


def test_a_batch_too_many_is_refused() -> None:
    run = new_run()
    with pytest.raises(UsageError, match="epoch -1 has 14 batches, and all were trained"):
        run.next_batch()
    train(run, {})
    with pytest.raises(UsageError, match="begin the next"):
        run.next_batch()


def test_ids_are_found_in_mappings_and_tuples() -> None:
    ids = np.array([3, 4])
    assert split_ids({"id": ids, "x": 1})[1] == {"x": 1}
    assert split_ids((1, 2, ids))[1] == (1, 2)
    for batch in ({"x": 1}, (1, 2), torch.zeros(2), ()):
        with pytest.raises(ConfigError, match=r"has no ids: pass weigh the batch as the loader gave it"):
            split_ids(batch)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (rayprune.OrderedSGD(), "'ordered_sgd' picks rows inside a train step"),
        (rayprune.Herding(prune_ratio=0.5), "'herding' needs passes without training"),
        (rayprune.DynaMS(proxy_width=0.5), "'dynams' needs the train step 'psp'"),
        (rayprune.Kakurenbo(prune_ratio=0.5), "'kakurenbo' needs forward passes over the hidden samples"),
    ],
)
def test_methods_that_need_more_than_a_trainer_are_refused_by_name(method: Method, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        new_run(method)


class Rescoring(rayprune.RandomEpoch):
    """Asks for forward passes without announcing them."""

    def select(self, table: Any, context: Any) -> Any:
        if context.epoch == 0:
            return super().select(table, context)
        kept = np.arange(N) >= 5
        return replace(rayprune.Selection.of_mask(kept, 0.1, 5), forward_only_ids=np.arange(5))


def test_forward_passes_that_were_not_announced_are_refused_when_they_come() -> None:
    run = new_run(Rescoring(prune_ratio=0.1))
    run.begin_epoch(0)
    train_batches(run, {})
    with pytest.raises(ConfigError, match="scores samples in passes without training"):
        run.begin_epoch(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_epochs": 0}, "num_epochs 0 must be a number above 0"),
        ({"num_epochs": float("inf")}, "num_epochs inf must be"),
        ({"num_epochs": "3"}, "num_epochs '3' must be"),
        ({"rows": 0}, "batch size 0 must be an integer of at least 1"),
        ({"rows": True}, "batch size True"),
        ({"world_size": 0}, "world_size 0"),
        ({"accumulation": 1.5}, "accumulation 1.5"),
        ({"rank": 2, "world_size": 2}, "rank 2 is not one of 2 processes: give 0 to 1"),
        ({"method": rayprune.Random(prune_ratio=0.5, class_floor=1)}, "needs labels"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        new_run(**options)


def test_a_planned_batch_is_of_its_rank_alone() -> None:
    run = new_run(rank=1, world_size=2)
    run.begin_epoch(0)
    batch = run.next_batch()
    assert isinstance(batch, PlannedBatch)
    assert batch.ids.tolist() == run.plan.order[4:8].tolist()
