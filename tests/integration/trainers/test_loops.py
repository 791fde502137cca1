"""Lightning and Accelerate train on the plan: each visit, in one and two processes, after a kill, to the last step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import GradientState
from lightning.pytorch.callbacks import GradientAccumulationScheduler

import rayprune
from rayprune.errors import ConfigError, UsageError
from tests.support.trainer_loops import (
    BATCH,
    EPOCHS,
    RATE,
    TRAIN,
    Points,
    Record,
    in_processes,
    new_model,
    planned_visits,
    train_accelerate,
    train_lightning,
    visits_of,
)

KINDS = sorted(TRAIN)


def trained(kind: str, **options: Any) -> Record:
    """Train in this process."""
    record: Record = TRAIN[kind](**options)  # type: ignore[operator]
    return record


def difference(one: Record, other: Record) -> float:
    """Return the largest difference of two runs' weights."""
    return max(float((a - b).abs().max()) for a, b in zip(one.weights, other.weights, strict=True))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_visits_equal_the_plan_and_the_schedule_ends_with_the_run(kind: str, accumulation: int) -> None:
    record = trained(kind, accumulation=accumulation)
    visits = visits_of([record])
    assert visits == planned_visits(0.7, [record], BATCH)
    assert [sum(visits[epoch].values()) for epoch in (0, EPOCHS - 1)] == [100, 100]
    assert sum(visits[1].values()) < 80
    assert record.rates[-1] == pytest.approx(RATE * 1e-3)
    assert record.rates[-2] > RATE * 1e-3
    batches = [math.ceil(sum(each.values()) / BATCH) for each in visits.values()]
    assert record.steps == sum(math.ceil(count / accumulation) for count in batches)


def test_lightning_validates_every_epoch() -> None:
    assert train_lightning().validated == list(range(EPOCHS))


@pytest.mark.parametrize("kind", KINDS)
def test_without_pruning_the_weights_are_those_of_a_plain_loop(kind: str) -> None:
    record = trained(kind, ratio=0.0)
    torch.manual_seed(1)
    net, data = new_model(), Points()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, total_iters=EPOCHS * 13)
    for _, ids, _ in record.visits:
        loss = torch.nn.functional.cross_entropy(net(data.x[ids]), data.y[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for own, plain in zip(record.weights, net.parameters(), strict=True):
        torch.testing.assert_close(own, plain.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_inside_the_epoch(kind: str, accumulation: int, tmp_path: Path) -> None:
    whole = trained(kind, accumulation=accumulation)
    in_processes(kind, 1, tmp_path, fails=True, accumulation=accumulation, save_every=2, folder=tmp_path, stop_after=21)
    newest = max(tmp_path.glob("step=*"), key=lambda path: int(path.name.split("=")[1].split(".")[0]))
    resumed = trained(kind, accumulation=accumulation, resume=str(newest))
    assert difference(whole, resumed) == 0.0
    assert resumed.rates[-1] == pytest.approx(RATE * 1e-3)
    merged = {epoch: visits_of([resumed])[epoch] for epoch in (2, 3)}
    assert merged == {epoch: visits_of([whole])[epoch] for epoch in (2, 3)}
    for name, column in whole.scores.items():
        torch.testing.assert_close(torch.from_numpy(resumed.scores[name]), torch.from_numpy(column), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_on_the_plan(kind: str, tmp_path: Path) -> None:
    devices = {"devices": 2} if kind == "lightning" else {}
    records = in_processes(kind, 2, tmp_path, accumulation=3, **devices)
    assert visits_of(records) == planned_visits(0.7, records, 2 * BATCH)
    assert len(records[0].visits) == len(records[1].visits)
    one = trained(kind, accumulation=3, batch_size=2 * BATCH)
    assert difference(records[0], one) < 1e-5
    assert difference(records[0], records[1]) == 0.0
    for name, column in records[0].scores.items():
        torch.testing.assert_close(torch.from_numpy(records[1].scores[name]), torch.from_numpy(column), equal_nan=True)


@pytest.mark.scenario
@pytest.mark.parametrize("kind", KINDS)
def test_two_killed_processes_go_on_inside_the_epoch(kind: str, tmp_path: Path) -> None:
    settings = {"accumulation": 3, "save_every": 2, "folder": tmp_path, "batch_size": BATCH // 2}
    if kind == "lightning":
        settings["devices"] = 2
    whole = in_processes(kind, 2, tmp_path / "whole", **{**settings, "save_every": 0})
    in_processes(kind, 2, tmp_path / "killed", fails=True, stop_after=21, **settings)
    newest = max(tmp_path.glob("step=*"), key=lambda path: int(path.name.split("=")[1].split(".")[0]))
    resumed = in_processes(kind, 2, tmp_path / "resumed", resume=newest, **{**settings, "save_every": 0})
    assert resumed[0].visits[0][0] == 1
    assert difference(whole[0], resumed[0]) == 0.0
    assert visits_of(resumed)[2] == visits_of(whole)[2]
    assert visits_of(resumed)[3] == visits_of(whole)[3]


def test_accelerate_needs_no_skipped_batches() -> None:
    loader = rayprune.accelerate.PrunedLoader(Points(), rayprune.InfoBatch(), EPOCHS, BATCH)
    with pytest.raises(ConfigError, match="leave skip_first_batches out"):
        accelerate.skip_first_batches(loader, 2)


def test_a_checkpoint_at_the_last_step_of_an_epoch_leads_to_the_next(tmp_path: Path) -> None:
    whole = train_lightning(save_every=13, folder=str(tmp_path))
    assert (tmp_path / "step=13.ckpt").is_file()
    assert difference(whole, train_lightning(resume=str(tmp_path / "step=13.ckpt"))) == 0.0
    train_accelerate(save_every=13, folder=str(tmp_path))
    resumed = train_accelerate(resume=str(tmp_path / "step=13"))
    assert difference(train_accelerate(), resumed) == 0.0


def test_lightning_may_make_the_loader_anew_in_every_epoch() -> None:
    record = train_lightning(reload_dataloaders_every_n_epochs=1)
    assert difference(record, train_lightning()) == 0.0


def test_lightning_makes_a_quick_trial_run() -> None:
    assert len(train_lightning(fast_dev_run=True).visits) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_train_batches": 2}, "limit_train_batches cuts the plan"),
        ({"max_steps": 9}, "no max_steps"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "use accumulate_grad_batches"),
        ({"schedule_steps": -1}, "build it for the callback's num_steps"),
    ],
)
def test_lightning_refuses_what_would_leave_the_plan(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_lightning(**options)


def test_accelerate_needs_its_accumulation_first() -> None:
    GradientState._reset_state()
    loader = rayprune.accelerate.PrunedLoader(Points(), rayprune.Full(), 2, BATCH)
    accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(UsageError, match="before the Accelerator"):
        next(loader.epochs())


def test_accelerate_refuses_epochs_that_it_can_not_end() -> None:
    with pytest.raises(ConfigError, match=r"num_epochs 1.5 must be an integer"):
        rayprune.accelerate.PrunedLoader(Points(), rayprune.InfoBatch(), 1.5, BATCH)  # type: ignore[arg-type]
    loader = rayprune.accelerate.PrunedLoader(Points(), rayprune.Full(), 2, BATCH)
    for _ in loader.epochs():
        break
    with pytest.raises(UsageError, match="in the body of"):
        next(iter(loader))
