"""Selections: construction, packing for checkpoints, immutability."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayprune.core import Selection


@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 10**6))
def test_a_selection_packs_and_unpacks(num_samples: int, num_weights: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.flatnonzero(rng.random(num_samples) < 0.9)
    weights = 0.25 + rng.integers(0, num_weights + 1, size=ids.size) / 8
    scalars = {"requested": 0.375, "expected_drops": 1.5, "lr_scale": 0.5}
    forward_only = np.setdiff1d(np.arange(num_samples), ids)[:3]
    selection = Selection.of_ids(ids, num_samples, weights=weights, forward_only_ids=forward_only, **scalars)
    again = Selection.from_arrays(selection.to_arrays())
    assert selection.weights.tolist() == weights.tolist()
    assert (again.codes.dtype, again.codes.tolist()) == (selection.codes.dtype, selection.codes.tolist())
    assert again.weights.tobytes() == selection.weights.tobytes()
    assert again.forward_only_ids.tolist() == forward_only.tolist()
    assert {name: getattr(again, name) for name in scalars} == scalars
    assert selection.realised == again.realised == 1 - ids.size / num_samples


def test_sweep_facts_and_batch_mean_weights_pack_and_unpack() -> None:
    base = Selection.of_ids([0, 1], 5, forward_only_ids=[3])
    for sweep, scored in (("all", None), (np.array([4, 0]), [0, 3, 4]), (None, [3])):
        selection = replace(base, sweep=sweep).with_facts(threshold=0.5)  # type: ignore[arg-type]
        again = Selection.from_arrays(selection.to_arrays())
        ids = again.scored_ids
        assert (ids is None and scored is None) or ids.tolist() == scored  # type: ignore[union-attr]
        assert again.num_scored == selection.num_scored == (5 if scored is None else len(scored))
        assert again.facts == {"threshold": 0.5}
        assert not again.batch_mean_weights
    mean = Selection(base.codes, base.weight_values, batch_mean_weights=True)
    assert Selection.from_arrays(mean.to_arrays()).batch_mean_weights


@pytest.mark.parametrize("num_weights", [1, 255, 256, 1000])
def test_codes_are_wide_enough_for_all_weights(num_weights: int) -> None:
    weights = np.arange(1, num_weights + 1, dtype=np.float32)
    selection = Selection.of_ids(np.arange(num_weights), num_weights + 1, weights=weights)
    assert selection.codes.dtype == (np.uint8 if num_weights <= 255 else np.uint16)
    assert Selection.from_arrays(selection.to_arrays()).weights.tolist() == weights.tolist()


@pytest.mark.parametrize("mask", [np.array([1, 0]), np.array([0.5, 1.0]), np.ones((2, 2), dtype=bool), "ab", 3])
def test_a_mask_must_be_bools(mask: Any) -> None:
    with pytest.raises(ValueError, match="kept must be a 1-d array of bool, got"):
        Selection.of_mask(mask)


def test_ids_may_come_in_any_order() -> None:
    selection = Selection.of_ids([4, 0, 2], 6, weights=[4.0, 1.0, 2.0])
    assert (selection.ids.tolist(), selection.weights.tolist()) == ([0, 2, 4], [1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([1, 1], {}, "ids repeat"),
        ([6], {}, "unknown ids"),
        ([0.5], {}, "1-d array of integers"),
        ([1], {"weights": [1.0, 2.0]}, "do not fit"),
        ([1], {"weights": [np.nan]}, "weights must be finite"),
        ([1], {"weights": [-1.0]}, "weights must be finite"),
        ([1], {"weights": [1e39]}, "weights must be finite"),
        ([1], {"requested": 1.0}, "requested prune ratio"),
        ([1], {"lr_scale": 0.0}, "lr_scale"),
        ([1], {"forward_only_ids": [6]}, "unknown ids"),
        ([1], {"forward_only_ids": [0, 1]}, "kept and forward-only"),
    ],
)
def test_invalid_arguments_are_refused(ids: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
        Selection.of_ids(ids, 6, **options)


def test_a_selection_is_immutable() -> None:
    for selection in (
        Selection.full(3),
        pickle.loads(pickle.dumps(Selection.full(3))),
        copy.deepcopy(Selection.of_ids([1], 3, weights=[2.0])),
        Selection.of_ids([1], 3, weights=[2.0], forward_only_ids=[0]),
        Selection.from_arrays(Selection.full(3).to_arrays()),
        Selection.full(3).with_facts(threshold=0.5),
    ):
        for name in ("codes", "weight_values", "forward_only_ids"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(selection, name)[...] = 0
        with pytest.raises(AttributeError, match="cannot assign"):
            selection.requested = 0.5
