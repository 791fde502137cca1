"""The Selector: invalid input, bookkeeping, and stored states."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core import Selection, Selector
from rayprune.errors import RunFolderError
from rayprune.methods import build_method


def build(method: Any = "infobatch", num_samples: int = 6, num_epochs: int = 8, **options: Any) -> Selector:
    return Selector(build_method(method), num_samples, num_epochs, **options)


def table_bytes(selector: Selector) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in selector.table.to_arrays().items()}


def edited_header(state: dict[str, NDArray[Any]], **changes: Any) -> dict[str, NDArray[Any]]:
    header = json.loads(bytes(state["header"]).decode()) | changes
    return state | {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}


@pytest.mark.parametrize(
    ("ids", "signals", "epoch", "message"),
    [
        ([0.0, 1.0], {"loss": [1, 2]}, 0, "1-d array of integers, got float64"),
        (np.array([0, 1], dtype=np.float32), {"loss": [1, 2]}, 0, "got float32"),
        ([True, False], {"loss": [1, 2]}, 0, "got bool"),
        ([[0, 1]], {"loss": [1]}, 0, r"of shape \(1, 2\)"),
        ([0, 6], {"loss": [1, 2]}, 0, r"unknown ids \[6\]: ids go from 0 to 5"),
        ([-1, 2], {"loss": [1, 2]}, 0, r"unknown ids \[-1\]"),
        (np.array([2**63 + 1], dtype=np.uint64), {"loss": [1]}, 0, "unknown ids"),
        ([2**70], {"loss": [1]}, 0, "got object"),
        ([1, 2, 1], {"loss": [1, 2, 3]}, 0, r"duplicate ids \[1\]"),
        ([1, 2], {}, 0, "signal 'loss' is missing"),
        ([1, 2], {"loss": [1]}, 0, "does not fit 2 ids"),
        ([1], {"loss": 1.0}, 0, "does not fit 1 ids"),
        ([1, 2], {"loss": [[1], [2]]}, 0, "must be one number per sample"),
        ([1, 2], {"loss": [[1, 2], [2, 3]]}, 0, "must be one number per sample"),
        ([1, 2], {"loss": ["a", "b"]}, 0, "must hold numbers"),
        ([1, 2], {"loss": [None, 1]}, 0, "must hold numbers"),
        ([1], {"loss": [1]}, -1, "epoch -1 is not an integer in"),
        ([1], {"loss": [1]}, 8, "epoch 8 is not an integer in"),
        ([1], {"loss": [1]}, 0.5, "epoch 0.5 is not an integer in"),
    ],
)
def test_invalid_observations_leave_the_table_unchanged(ids: Any, signals: Any, epoch: Any, message: str) -> None:
    selector = build()
    selector.observe([0, 5], {"loss": [1.0, 2.0]}, 0)
    before = table_bytes(selector)
    with pytest.raises(ValueError, match=message):
        selector.observe(ids, signals, epoch)
    assert table_bytes(selector) == before
    assert selector.num_nonfinite == 0


def test_an_empty_observation_is_accepted() -> None:
    selector = build()
    selector.observe([], {"loss": []}, 0)
    selector.observe(np.empty(0, dtype=np.int64), {"loss": np.empty(0, dtype=np.float32)}, 0)
    assert not selector.table.visited.any()


def test_integer_dtypes_and_numpy_epochs_are_accepted() -> None:
    selector = build(seed=np.int64(2))
    for epoch, dtype in enumerate((np.uint8, np.int32, np.uint64)):
        selector.begin_epoch(np.int64(epoch))  # type: ignore[arg-type]
        selector.observe(np.array([0, 5], dtype=dtype), {"loss": np.array([1, 2], dtype=np.float16)}, np.int64(epoch))  # type: ignore[arg-type]
    again = build(seed=2)
    again.load_state_dict(selector.state_dict())
    assert again.epoch == 2
    assert again.table.last_visit.tolist() == [2, -1, -1, -1, -1, 2]


def test_nonfinite_rows_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    selector = build(num_samples=50)
    losses = np.arange(50.0)
    losses[[3, 4, 5]] = [np.nan, np.inf, -np.inf]
    with caplog.at_level(logging.WARNING, logger="rayprune.core.selector"):
        selector.observe(np.arange(50), {"loss": losses}, 0)
    assert "epoch 0: 3 NaN or infinite signals left out, ids [3, 4, 5]" in caplog.text
    assert (selector.num_nonfinite, selector.nonfinite_ids) == (3, [3, 4, 5])
    assert np.flatnonzero(~selector.table.visited).tolist() == [3, 4, 5]
    assert np.flatnonzero(np.isnan(selector.scores()["loss"])).tolist() == [3, 4, 5]
    selector.observe(np.arange(50), {"loss": np.full(50, np.nan)}, 0)
    assert selector.num_nonfinite == 53
    assert len(selector.nonfinite_ids) == 20
    assert selector.scores()["loss"][10] == 10
    restored = build(num_samples=50)
    restored.load_state_dict(selector.state_dict())
    assert (restored.num_nonfinite, restored.nonfinite_ids) == (53, selector.nonfinite_ids)


def test_a_loss_beyond_float32_counts_as_infinite() -> None:
    selector = build()
    selector.observe([0, 1], {"loss": np.array([1e300, 1.0])}, 0)
    assert selector.nonfinite_ids == [0]
    assert not np.isinf(selector.scores()["loss"]).any()


def test_recorded_signals_are_averaged_over_visits() -> None:
    selector = build(record=("el2n",))
    for epoch, values in enumerate(([1.0, 2.0], [3.0, 4.0])):
        for _ in range(2):  # a repeated observation counts once
            selector.observe([0, 5], {"loss": [1.0, 1.0], "el2n": values}, epoch)
    scores = selector.scores()
    assert scores["el2n_mean"][[0, 5]].tolist() == [2.0, 3.0]
    assert np.isnan(scores["el2n_mean"][1:5]).all()
    assert scores["visits"].tolist() == [2, 0, 0, 0, 0, 2]


def test_a_recorded_signal_of_several_numbers_leaves_the_table_unchanged() -> None:
    selector = build(record=("probs",))
    before = table_bytes(selector)
    with pytest.raises(
        ValueError, match=r"signal 'probs' of shape \(2, 3\): train\.record takes one number per sample"
    ):
        selector.observe([0, 1], {"loss": [1.0, 2.0], "probs": np.ones((2, 3))}, 0)
    assert table_bytes(selector) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples 0 must be an integer of at least 1"),
        ({"num_samples": 2.0}, "num_samples 2.0 must be an integer"),
        ({"num_epochs": 0}, "num_epochs 0 must be"),
        ({"seed": -1}, "seed -1 must be"),
        ({"seed": True}, "seed True must be"),
        ({"labels": [0, 1]}, r"labels must be 6 integers, got int64 of shape \(2,\)"),
        ({"labels": [0.0] * 6}, "labels must be 6 integers, got float64"),
        ({"labels": [0, 1, 2, 3, 4, -1]}, "labels must be at least 0, got -1"),
        ({"method": {"name": "infobatch", "class_floor": 0.5}}, "class_floor 0.5 needs labels"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("epoch", [-1, 8, 1.0, True, None, "1"])
def test_an_epoch_outside_the_run_is_refused(epoch: Any) -> None:
    with pytest.raises(ValueError, match=r"is not an integer in \[0, 8\)"):
        build().begin_epoch(epoch)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"method": "full"}, "method"),
        ({"method": {"name": "infobatch", "prune_ratio": 0.4}}, "method"),
        ({"num_samples": 7}, "num_samples 6, here 7"),
        ({"num_epochs": 9}, "num_epochs 8, here 9"),
        ({"seed": 1}, "seed 0, here 1"),
    ],
)
def test_the_state_of_another_run_is_refused(other: dict[str, Any], field: str) -> None:
    target = build(**other)
    before = table_bytes(target)
    with pytest.raises(RunFolderError, match=f"another run: {field}"):
        target.load_state_dict(build().state_dict())
    assert table_bytes(target) == before


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(RunFolderError, match="state of schema 2, this version reads up to 1"):
        build().load_state_dict(edited_header(build().state_dict(), schema=2))


@pytest.mark.parametrize(
    ("prefix", "changes", "message"),
    [
        ("header", {}, "has no readable header"),
        ("", {"header": np.frombuffer(b"garbage", dtype=np.uint8)}, "has no readable header"),
        ("", {"header": np.frombuffer(b"[1]", dtype=np.uint8)}, "has no readable header"),
        ("", {"header": np.frombuffer(b"{}", dtype=np.uint8)}, "header lacks epoch, method"),
        ("selection/bitmap", {}, "selection lacks bitmap"),
        ("selection/", {}, "selection lacks bitmap, forward_only_ids, more, num_samples"),
        ("", {"selection/num_samples": np.array(5), "selection/weight_codes": np.ones(5, np.uint8)}, "over 5 samples"),
        ("", {"selection/num_samples": np.array(90)}, "8 bits for 90 samples"),
        ("", {"selection/weight_codes": np.ones(1, np.uint8)}, "1 weight codes do not fit its 6 kept"),
        ("", {"selection/weight_codes": np.full(6, 9, np.uint8)}, "weight codes do not fit"),
        ("table/last_visit", {}, "columns differ"),
    ],
)
def test_an_incomplete_state_changes_nothing(prefix: str, changes: dict[str, NDArray[Any]], message: str) -> None:
    """Entries that start with the prefix are missing, and the changes are laid over the rest."""
    stored, target = build(), build()
    for selector, loss in ((stored, 1.0), (target, 2.0)):
        selector.begin_epoch(0)
        selector.observe([0, 1], {"loss": [loss, loss]}, 0)
    stored.begin_epoch(1)
    rest = {name: a for name, a in stored.state_dict().items() if not (prefix and name.startswith(prefix))}
    before = table_bytes(target)
    with pytest.raises(RunFolderError, match=message) as caught:
        target.load_state_dict(rest | changes)
    assert "\n" not in str(caught.value)
    assert table_bytes(target) == before
    assert target.epoch == 0


@pytest.mark.parametrize("method", ["infobatch", None, type(build_method("infobatch")), {"name": "infobatch"}])
def test_only_a_method_is_accepted(method: Any) -> None:
    with pytest.raises(ValueError, match=r"method must be a rayprune method .*: give an instance") as caught:
        Selector(method, 6, 8)
    assert "\n" not in str(caught.value)


def test_labels_that_look_like_ids_are_refused() -> None:
    floored = {"name": "infobatch", "class_floor": 0.5}
    with pytest.raises(ValueError, match=f"labels look like ids: the largest of 6 is {2**40}"):
        build(floored, labels=[0, 1, 2, 3, 4, 2**40])
    build(floored, labels=[0, 1, 2, 3, 4, 21_842]).begin_epoch(0)


def test_skipped_epochs_count_as_not_trained() -> None:
    selector = build("full")
    for epoch in (0, 1, 5, 7):
        selector.begin_epoch(epoch)
    assert selector.visits_before == 3 * 6


def test_a_state_with_other_columns_or_dtypes_is_refused() -> None:
    state = build().state_dict()
    with pytest.raises(RunFolderError, match=r"column 'last_visit' is float32\(6,\), not int32\(6,\)"):
        build().load_state_dict(state | {"table/last_visit": np.zeros(6, dtype=np.float32)})
    with pytest.raises(RunFolderError, match="columns differ"):
        build().load_state_dict(state | {"table/column/margin": np.zeros(6)})


def test_visits_and_prunings_are_counted() -> None:
    selector = build({"name": "random", "prune_ratio": 0.5}, num_samples=10, num_epochs=300)
    kept = selector.begin_epoch(0).ids
    for epoch in range(300):
        assert selector.begin_epoch(epoch).ids.tolist() == kept.tolist()
        selector.observe(kept[:2], {"loss": np.ones(2)}, epoch)
        assert selector.visits_before == 5 * epoch
    pruned = np.setdiff1d(np.arange(10), kept)
    assert selector.table.times_pruned[pruned].tolist() == [300] * 5
    assert selector.table.times_pruned[kept].tolist() == [0] * 5
    assert selector.table.last_visit[kept].tolist() == [299, 299, -1, -1, -1]
    assert (selector.table.last_visit[pruned] == -1).all()


def test_an_epoch_that_drops_nothing_as_intended_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    selector = build("random")
    monkeypatch.setattr(type(selector.method), "select", lambda *_: Selection.of_mask(np.ones(6, dtype=bool), 0.5, 3))
    with pytest.raises(RuntimeError, match=r"meant to drop 3 samples at prune ratio 0\.5 and dropped none"):
        selector.begin_epoch(0)
