"""Learning rates against torch's schedulers and closed forms, and optimizers with the requested values."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from rayprune.nn.optim import LR_SCHEDULES, build_optimizer, learning_rate, progress_lr


def torch_onecycle(num_steps: int, peak: float, pct_start: float = 0.3) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=num_steps, pct_start=pct_start)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the scheduler steps without its optimizer
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            if len(rates) < num_steps:
                scheduler.step()
    return rates


@pytest.mark.parametrize("num_steps", [10, 57, 400])
def test_onecycle_equals_torch(num_steps: int) -> None:
    pct_start = (0.3 * (num_steps - 1) + 1) / num_steps  # with this, torch puts the peak at 0.3 of its course
    rates = [learning_rate("onecycle", t / (num_steps - 1), peak=0.4) for t in range(num_steps)]
    assert rates == pytest.approx(torch_onecycle(num_steps, 0.4, pct_start), rel=1e-6, abs=0)


def test_onecycle_is_the_limit_of_many_steps_of_torchs_default() -> None:
    num_steps = 4000
    rates = [learning_rate("onecycle", t / (num_steps - 1), peak=1.0) for t in range(num_steps)]
    assert rates == pytest.approx(torch_onecycle(num_steps, 1.0), rel=0, abs=1e-3)


def test_cosine_equals_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for t in range(20):
        assert learning_rate("cosine", t / 20, peak=0.3) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", sorted(LR_SCHEDULES))
def test_every_schedule_is_defined_to_its_end(schedule: str) -> None:
    warmup = 0.0 if schedule == "onecycle" else 0.2
    rates = [learning_rate(schedule, t / 100, peak=0.5, warmup=warmup) for t in range(101)]
    assert all(0.0 <= rate <= 0.5 for rate in rates)
    assert max(rates) == pytest.approx(0.5)


def test_warmup_rises_linearly_and_joins_the_schedule() -> None:
    rates = [learning_rate("cosine", t, peak=1.0, warmup=0.1) for t in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_milestones_are_fractions_of_the_whole_training() -> None:
    rates = [learning_rate("step", t, peak=1.0, warmup=0.1, milestones=(0.3, 0.6)) for t in (0.29, 0.3, 0.59, 0.6)]
    assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_optimizers_have_the_requested_values() -> None:
    model = nn.Linear(2, 2)
    sgd = build_optimizer("sgd", model, lr=0.1, momentum=0.8, weight_decay=5e-4, nesterov=True)
    assert isinstance(sgd, torch.optim.SGD)
    assert len(sgd.param_groups) == 1
    expected = {"lr": 0.1, "momentum": 0.8, "weight_decay": 5e-4, "nesterov": True}
    assert expected.items() <= sgd.param_groups[0].items()
    adamw = build_optimizer("adamw", model, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    assert isinstance(adamw, torch.optim.AdamW)
    assert len(adamw.param_groups[0]["params"]) == 2
    assert {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.05}.items() <= adamw.param_groups[0].items()


def test_progress_lr_sets_the_rates_of_every_group_and_resumes() -> None:
    def fresh() -> torch.optim.Optimizer:
        groups = [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4}]
        return torch.optim.SGD(groups, lr=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = fresh()
        scheduler = progress_lr(optimizer, lambda progress: 1 - progress)
        assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
        scheduler.step(0.5, scale=2.0)
        assert scheduler.get_last_lr() == [0.1, 0.4]
        scheduler.step(0.75)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.1])
        again = progress_lr(other := fresh(), lambda progress: 1 - progress)
        other.load_state_dict(optimizer.state_dict())
        again.load_state_dict(scheduler.state_dict())
        assert (again.progress, again.get_last_lr()) == (0.75, scheduler.get_last_lr())
        again.step(1.0)
        assert [group["lr"] for group in other.param_groups] == [0.0, 0.0]
    tensors = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    rate = tensors.param_groups[0]["lr"]
    progress_lr(tensors, lambda progress: 1 - progress).step(0.5)
    assert tensors.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)


def test_progress_lr_says_what_it_needs() -> None:
    scheduler = progress_lr(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), lambda progress: 1.0)
    with pytest.raises(RuntimeError, match=r"call step\(shard\.progress\) after optimizer\.step\(\)"):
        scheduler.step()
    with pytest.raises(ValueError, match=r"progress 3 must be in \[0, 1\]"):
        scheduler.step(3)
