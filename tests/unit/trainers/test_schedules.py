"""Schedules that count steps end with the run, whatever the epochs' lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rayprune
from rayprune.core.method import Method
from rayprune.trainers.run import PlannedRun
from rayprune.trainers.schedules import StepPacer, scale_learning_rates

N = 40


@dataclass(frozen=True)
class FirstRows(Method):
    """Keep the first rows, a given number in each epoch."""

    counts: tuple[int, ...] = ()
    scale: float = 1.0

    kind = "dynamic"

    def select(self, table: Any, context: Any) -> Any:
        kept = np.arange(N) < self.counts[context.epoch]
        return replace(rayprune.Selection.of_mask(kept, 0.0, 0), lr_scale=self.scale)


def paced(counts: list[int], accumulation: int, cut: float = 0.0) -> tuple[int, list[int]]:
    """Return T and the steps of the schedule after each optimizer step."""
    run = PlannedRun(FirstRows(counts=tuple(counts)), N, len(counts) - cut, 4, accumulation=accumulation)
    pacer, steps = StepPacer(run), []
    for epoch in range(len(counts)):
        run.begin_epoch(epoch)
        while run.updates_left:
            for _ in range(min(accumulation, run.num_batches - run.step)):
                run.record(run.next_batch(), {})
            steps.append(pacer.steps())
    assert run.progress == pytest.approx(1.0)
    return run.num_full_updates, steps


COUNTS = st.lists(st.integers(1, N), min_size=1, max_size=6)


@given(counts=COUNTS, accumulation=st.integers(1, 4), cut=st.sampled_from([0.0, 0.5, 0.9]))
def test_a_schedule_ends_with_the_run(counts: list[int], accumulation: int, cut: float) -> None:
    total, steps = paced(counts, accumulation, cut)
    assert sum(steps) == total
    assert min(steps) >= 1


@given(epochs=st.integers(1, 6), accumulation=st.integers(1, 4), cut=st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_without_pruning_a_schedule_makes_one_step_each(epochs: int, accumulation: int, cut: float) -> None:
    total, steps = paced([N] * epochs, accumulation, cut)
    assert steps == [1] * total


class Subclass(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Subclass])
def test_the_methods_factor_is_on_the_rate_during_a_step_only(kind: type[torch.optim.SGD]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = kind([{"params": [parameter], "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    factor = [1.0]
    scale_learning_rates(optimizer, lambda: factor[0])
    moves, rates = [], []
    for factor[0] in (1.0, 4.0, 2.0):
        before = parameter.item()
        parameter.grad = torch.ones(1)
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        moves.append(before - parameter.item())
    assert moves == pytest.approx([0.1, 0.2, 0.05])
    assert rates == pytest.approx([0.1, 0.05, 0.025])


def test_the_factor_is_that_of_the_current_epoch() -> None:
    run = PlannedRun(FirstRows(counts=(4, 4), scale=3.0), N, 2, 4)
    assert run.lr_scale == 1.0
    run.begin_epoch(0)
    assert run.lr_scale == 3.0
