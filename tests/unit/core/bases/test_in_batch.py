"""Contexts of training steps, candidates, and the draws of in-batch methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rayprune.core.bases.in_batch import (
    BatchContext,
    Candidates,
    InBatchMethod,
    Picked,
    StepContext,
    checked,
    num_picked,
)
from rayprune.core.table import Signals


def context(**place: Any) -> StepContext:
    return StepContext(
        **{"epoch": 1, "num_epochs": 4, "step": 3, "num_steps": 10, "num_samples": 99, "seed": 5, **place}
    )


def of_rows(ids: Any, **columns: Any) -> BatchContext:
    ids = np.asarray(ids)
    return context().with_rows(ids, ids % 3, {name: np.asarray(column) for name, column in columns.items()})


@dataclass(frozen=True)
class Highest(InBatchMethod):
    """Pick the higher half by loss, with its place in the order of losses as weight."""

    def pick(self, signals: Signals, context: BatchContext) -> Picked:
        rows = np.argsort(-signals["loss"], kind="stable")[: num_picked(0.5, context.num_rows)]
        return rows, np.arange(1.0, rows.size + 1)


def test_progress_goes_from_zero_to_one() -> None:
    steps = [context(epoch=epoch, step=step).progress for epoch in range(4) for step in range(10)]
    assert steps == pytest.approx(np.arange(40) / 40)


def test_every_step_has_a_generator_of_its_own() -> None:
    places = [{}, {"epoch": 2}, {"step": 4}, {"seed": 6}, {"epoch": 3, "step": 1}]
    drawn = {context(**place).rng.random() for place in places}
    drawn |= {context().derived_rng(6).random(), np.random.default_rng([5, 1, 3]).random()}
    drawn |= {np.random.default_rng([5, 1]).random(), context(epoch=1, step=0).rng.random()}
    assert len(drawn) == 9
    assert context(num_epochs=9, num_steps=99).rng.random() == context().rng.random()


def test_a_context_of_rows_keeps_the_step_and_starts_its_generator_anew() -> None:
    step = context(facts={"share": 0.5})
    first = step.rng.random()
    batch = step.with_rows(np.arange(3), np.zeros(3, dtype=np.int64), {})
    assert (batch.epoch, batch.step, batch.facts, batch.num_rows) == (1, 3, {"share": 0.5}, 3)
    assert batch.rng.random() == first


def test_ties_go_to_the_lower_id_wherever_it_stands() -> None:
    rows, weights = Candidates({"loss": np.array([2.0, 1.0, 2.0, 2.0])}, of_rows([9, 4, 7, 8])).pick(Highest())
    assert rows.tolist() == [2, 3]
    assert weights.tolist() == [1.0, 2.0]
    assert weights.dtype == np.float32


def test_padding_and_diverged_rows_are_no_candidates() -> None:
    losses = np.array([np.nan, 5.0, 9.0, 1.0, np.inf, 2.0])
    real = np.array([True, True, False, True, True, True])
    candidates = Candidates({"loss": losses}, of_rows([5, 4, 3, 2, 1, 0], old=np.arange(6.0)), real)
    assert candidates.rows.tolist() == [5, 3, 1]
    assert candidates.context.ids.tolist() == [0, 2, 4]
    assert candidates.context.labels.tolist() == [0, 2, 1]
    assert candidates.context.columns["old"].tolist() == [5.0, 3.0, 1.0]
    assert candidates.pick(Highest())[0].tolist() == [1, 5]
    nothing = Candidates({"loss": losses}, of_rows(range(6)), np.zeros(6, dtype=bool))
    assert nothing.pick(Highest())[0].size == 0
    assert nothing.update(Highest()) == {}


def test_vector_signals_count_as_diverged_by_any_number() -> None:
    vectors = np.ones((3, 2))
    vectors[1, 1] = np.nan
    assert Candidates({"probs": vectors}, of_rows(range(3))).rows.tolist() == [0, 2]


def test_a_permuted_pick_is_that_of_other_rows() -> None:
    losses = np.arange(40.0)
    candidates = Candidates({"loss": losses}, of_rows(range(40)))
    plain, permuted = candidates.pick(Highest())[0], candidates.pick(Highest(), permuted=True)[0]
    assert plain.tolist() == list(range(20, 40))
    assert permuted.size == 20
    assert 5 <= np.count_nonzero(permuted < 20) <= 15
    assert permuted.tolist() == candidates.pick(Highest(), permuted=True)[0].tolist()


@pytest.mark.parametrize(
    ("rows", "weights", "fault"),
    [
        ([0, 0], None, "a row twice"),
        ([], None, "instead of one or more integers"),
        ([0.0], None, "rows float64"),
        ([[0]], None, r"of shape \(1, 1\)"),
        ([-1], None, "rows from -1 to -1 of 3"),
        ([3], None, "rows from 3 to 3 of 3"),
        ([0, 1], [1.0], "1 weights for 2 rows"),
        ([0], [np.nan], "not finite"),
        ([0], [-1.0], "not finite and at least 0"),
    ],
)
def test_a_wrong_pick_is_refused(rows: Any, weights: Any, fault: str) -> None:
    with pytest.raises(ValueError, match=rf"method 'mine' picked .*{fault}.*: pick\(\) returns distinct rows"):
        checked((np.asarray(rows), weights), 3, "mine")


def test_a_class_floor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"class_floor = 0\.1: Highest chooses inside batches"):
        Highest(class_floor=0.1)


def test_a_method_without_pick_says_so() -> None:
    with pytest.raises(TypeError, match=r"InBatchMethod defines no pick\(\)"):
        Candidates({"loss": np.ones(2)}, of_rows(range(2))).pick(InBatchMethod())
