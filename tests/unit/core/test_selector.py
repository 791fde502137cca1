"""The Selector at its edges: bad input, stored states, and methods from outside the package."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayprune.core import ScoreTable, Selection, Selector
from rayprune.methods import build_method
from rayprune.methods.infobatch import InfoBatch
from tests.support.paths import ROOT

HARDEST = '''"""Keep the hardest half."""

from dataclasses import dataclass

import numpy as np

from rayprune.core import Selection
from rayprune.methods import Method


@dataclass(frozen=True)
class Hardest(Method):
    """Keep the samples of highest loss."""

    kind, paper, signals = "dynamic", "a test", ("loss",)
    keep: int = 3

    def select(self, table, context):
        if not table.visited.all():
            return Selection.full(context.num_samples)
        ids = np.argsort(-table["loss"], kind="stable")[: self.keep]
        return Selection.of_ids(ids, context.num_samples, requested=0.5, expected_drops=context.num_samples - self.keep)


class NoMethod:
    """Something else."""
'''


def selector(method: Any = "infobatch", num_samples: int = 6, num_epochs: int = 8, **options: Any) -> Selector:
    return Selector(build_method(method), num_samples, num_epochs, **options)


def table_bytes(chosen: Selector) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in chosen.table.to_arrays().items()}


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
        ([1, 2], {"loss": [[1], [2]]}, 0, "must be one number a sample"),
        ([1, 2], {"loss": [[1, 2], [2, 3]]}, 0, "must be one number a sample"),
        ([1, 2], {"loss": ["a", "b"]}, 0, "must hold numbers"),
        ([1, 2], {"loss": [None, 1]}, 0, "must hold numbers"),
        ([1], {"loss": [1]}, -1, "epoch -1 is no integer in"),
        ([1], {"loss": [1]}, 8, "epoch 8 is no integer in"),
        ([1], {"loss": [1]}, 0.5, "epoch 0.5 is no integer in"),
    ],
)
def test_bad_observations_leave_the_table_unchanged(ids: Any, signals: Any, epoch: Any, message: str) -> None:
    chosen = selector()
    chosen.observe([0, 5], {"loss": [1.0, 2.0]}, 0)
    before = table_bytes(chosen)
    with pytest.raises(ValueError, match=message):
        chosen.observe(ids, signals, epoch)
    assert table_bytes(chosen) == before
    assert chosen.num_nonfinite == 0


def test_nothing_to_observe_is_no_error() -> None:
    chosen = selector()
    chosen.observe([], {"loss": []}, 0)
    chosen.observe(np.empty(0, dtype=np.int64), {"loss": np.empty(0, dtype=np.float32)}, 0)
    assert not chosen.table.visited.any()


def test_integer_dtypes_and_numpy_epochs_are_accepted() -> None:
    chosen = selector(seed=np.int64(2))
    for epoch, dtype in enumerate((np.uint8, np.int32, np.uint64)):
        chosen.begin_epoch(np.int64(epoch))  # type: ignore[arg-type]
        chosen.observe(np.array([0, 5], dtype=dtype), {"loss": np.array([1, 2], dtype=np.float16)}, np.int64(epoch))  # type: ignore[arg-type]
    again = selector(seed=2)
    again.load_state_dict(chosen.state_dict())
    assert again.epoch == 2
    assert again.table.last_visit.tolist() == [2, -1, -1, -1, -1, 2]


def test_rows_that_are_not_finite_never_enter(caplog: pytest.LogCaptureFixture) -> None:
    chosen = selector(num_samples=50)
    losses = np.arange(50.0)
    losses[[3, 4, 5]] = [np.nan, np.inf, -np.inf]
    with caplog.at_level(logging.WARNING, logger="rayprune.core.selector"):
        chosen.observe(np.arange(50), {"loss": losses}, 0)
    assert "epoch 0: 3 NaN or infinite signals left out, ids [3, 4, 5]" in caplog.text
    assert (chosen.num_nonfinite, chosen.nonfinite_ids) == (3, [3, 4, 5])
    assert np.flatnonzero(~chosen.table.visited).tolist() == [3, 4, 5]
    assert np.flatnonzero(np.isnan(chosen.scores()["loss"])).tolist() == [3, 4, 5]
    chosen.observe(np.arange(50), {"loss": np.full(50, np.nan)}, 0)
    assert chosen.num_nonfinite == 53
    assert len(chosen.nonfinite_ids) == 20
    assert chosen.scores()["loss"][10] == 10
    restored = selector(num_samples=50)
    restored.load_state_dict(chosen.state_dict())
    assert (restored.num_nonfinite, restored.nonfinite_ids) == (53, chosen.nonfinite_ids)


def test_a_loss_beyond_float32_counts_as_infinite() -> None:
    chosen = selector()
    chosen.observe([0, 1], {"loss": np.array([1e300, 1.0])}, 0)
    assert chosen.nonfinite_ids == [0]
    assert not np.isinf(chosen.scores()["loss"]).any()


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
def test_bad_selectors_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector(**options)


@pytest.mark.parametrize("epoch", [-1, 8, 1.0, True, None, "1"])
def test_only_epochs_of_the_run_begin(epoch: Any) -> None:
    with pytest.raises(ValueError, match=r"is no integer in \[0, 8\)"):
        selector().begin_epoch(epoch)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"method": "full"}, "method"),
        ({"method": {"name": "infobatch", "prune_ratio": 0.4}}, "method"),
        ({"num_samples": 7}, "num_samples 6, here 7"),
        ({"num_epochs": 9}, "num_epochs 8, here 9"),
        ({"seed": 1}, "seed 0, here 1"),
    ],
)
def test_the_state_of_another_run_is_refused(other: dict[str, Any], named: str) -> None:
    target = selector(**other)
    before = table_bytes(target)
    with pytest.raises(ValueError, match=f"another run: {named}"):
        target.load_state_dict(selector().state_dict())
    assert table_bytes(target) == before


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="state of schema 2, this version reads up to 1"):
        selector().load_state_dict(edited_header(selector().state_dict(), schema=2))


@pytest.mark.parametrize(
    ("left_out", "changed", "message"),
    [
        ("header", {}, "has no readable header"),
        ("", {"header": np.frombuffer(b"garbage", dtype=np.uint8)}, "has no readable header"),
        ("", {"header": np.frombuffer(b"[1]", dtype=np.uint8)}, "has no readable header"),
        ("", {"header": np.frombuffer(b"{}", dtype=np.uint8)}, "header lacks epoch, method"),
        ("selection/bitmap", {}, "selection lacks bitmap"),
        ("selection/", {}, "selection lacks bitmap, forward_only_ids, num_samples"),
        ("", {"selection/num_samples": np.array(5), "selection/weight_codes": np.ones(5, np.uint8)}, "over 5 samples"),
        ("", {"selection/num_samples": np.array(90)}, "8 bits for 90 samples"),
        ("", {"selection/weight_codes": np.ones(1, np.uint8)}, "1 weight codes do not fit its 6 kept"),
        ("", {"selection/weight_codes": np.full(6, 9, np.uint8)}, "weight codes do not fit"),
        ("table/last_visit", {}, "columns differ"),
    ],
)
def test_a_state_that_is_not_whole_changes_nothing(
    left_out: str, changed: dict[str, NDArray[Any]], message: str
) -> None:
    stored, target = selector(), selector()
    for each, loss in ((stored, 1.0), (target, 2.0)):
        each.begin_epoch(0)
        each.observe([0, 1], {"loss": [loss, loss]}, 0)
    stored.begin_epoch(1)
    kept = {name: a for name, a in stored.state_dict().items() if not (left_out and name.startswith(left_out))}
    before = table_bytes(target)
    with pytest.raises(ValueError, match=message) as caught:
        target.load_state_dict(kept | changed)
    assert "\n" not in str(caught.value)
    assert table_bytes(target) == before
    assert target.epoch == 0


@pytest.mark.parametrize("method", ["infobatch", None, type(build_method("infobatch")), {"name": "infobatch"}])
def test_only_a_method_selects(method: Any) -> None:
    with pytest.raises(ValueError, match=r"method must be a rayprune method such as InfoBatch\(\), got") as caught:
        Selector(method, 6, 8)
    assert "\n" not in str(caught.value)


def test_labels_that_are_ids_are_refused() -> None:
    floored = {"name": "infobatch", "class_floor": 0.5}
    with pytest.raises(ValueError, match=f"labels look like ids: the largest of 6 is {2**40}"):
        selector(floored, labels=[0, 1, 2, 3, 4, 2**40])
    selector(floored, labels=[0, 1, 2, 3, 4, 21_842]).begin_epoch(0)


def test_skipped_epochs_count_as_not_trained() -> None:
    chosen = selector("full")
    for epoch in (0, 1, 5, 7):
        chosen.begin_epoch(epoch)
    assert chosen.visits_before == 3 * 6


def test_a_table_of_other_columns_or_dtypes_is_refused() -> None:
    state = selector().state_dict()
    with pytest.raises(ValueError, match=r"column 'last_visit' is float32\(6,\), not int32\(6,\)"):
        selector().load_state_dict(state | {"table/last_visit": np.zeros(6, dtype=np.float32)})
    with pytest.raises(ValueError, match="columns differ"):
        selector().load_state_dict(state | {"table/column/margin": np.zeros(6)})


def test_visits_and_prunings_are_counted() -> None:
    chosen = selector({"name": "random", "prune_ratio": 0.5}, num_samples=10, num_epochs=300)
    kept = chosen.begin_epoch(0).ids
    for epoch in range(300):
        assert chosen.begin_epoch(epoch).ids.tolist() == kept.tolist()
        chosen.observe(kept[:2], {"loss": np.ones(2)}, epoch)
        assert chosen.visits_before == 5 * epoch
    pruned = np.setdiff1d(np.arange(10), kept)
    assert chosen.table.times_pruned[pruned].tolist() == [300] * 5
    assert chosen.table.times_pruned[kept].tolist() == [0] * 5
    assert chosen.table.last_visit[kept].tolist() == [299, 299, -1, -1, -1]
    assert (chosen.table.last_visit[pruned] == -1).all()


@pytest.mark.parametrize(
    ("num_epochs", "dtype"), [(1, np.uint8), (255, np.uint8), (256, np.uint16), (70_000, np.uint32)]
)
def test_the_counter_of_prunings_is_wide_enough(num_epochs: int, dtype: type) -> None:
    table = ScoreTable(3, {"loss": np.float32, "window": (np.float16, (4,)), "count": np.int32}, num_epochs)
    assert table.times_pruned.dtype == dtype
    assert np.iinfo(dtype).max >= num_epochs
    assert np.isnan(table["window"]).all()
    assert table["window"].shape == (3, 4)
    assert (table["count"] == 0).all()


def test_a_permuted_table_moves_rows_and_leaves_the_original() -> None:
    table = ScoreTable(4, {"loss": np.float32, "window": (np.float32, (2,))}, 5)
    table["loss"][:] = [0, 1, 2, 3]
    table["window"][:, 0] = [0, 10, 20, 30]
    table.last_visit[:] = [4, 3, 2, -1]
    table.times_pruned[:] = [1, 2, 3, 4]
    moved = table.permuted(np.array([3, 0, 1, 2]))
    assert moved["loss"].tolist() == [3, 0, 1, 2]
    assert moved["window"][:, 0].tolist() == [30, 0, 10, 20]
    assert moved.last_visit.tolist() == [-1, 4, 3, 2]
    assert moved.times_pruned.tolist() == [1, 2, 3, 4]
    moved["loss"][:] = 9
    assert table["loss"].tolist() == [0, 1, 2, 3]


@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 10**6))
def test_a_selection_packs_and_unpacks(num_samples: int, num_weights: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.flatnonzero(rng.random(num_samples) < 0.9)
    weights = 0.25 + rng.integers(0, num_weights + 1, size=ids.size) / 8
    extra = {"requested": 0.375, "expected_drops": 1.5, "lr_scale": 0.5}
    left = np.setdiff1d(np.arange(num_samples), ids)[:3]
    chosen = Selection.of_ids(ids, num_samples, weights=weights, forward_only_ids=left, **extra)
    again = Selection.from_arrays(chosen.to_arrays())
    assert chosen.weights.tolist() == weights.tolist()
    assert (again.codes.dtype, again.codes.tolist()) == (chosen.codes.dtype, chosen.codes.tolist())
    assert again.weights.tobytes() == chosen.weights.tobytes()
    assert again.forward_only_ids.tolist() == left.tolist()
    assert {name: getattr(again, name) for name in extra} == extra
    assert chosen.realised == again.realised == 1 - ids.size / num_samples


@pytest.mark.parametrize("num_weights", [1, 255, 256, 1000])
def test_many_weights_survive(num_weights: int) -> None:
    weights = np.arange(1, num_weights + 1, dtype=np.float32)
    chosen = Selection.of_ids(np.arange(num_weights), num_weights + 1, weights=weights)
    assert chosen.codes.dtype == (np.uint8 if num_weights <= 255 else np.uint16)
    assert Selection.from_arrays(chosen.to_arrays()).weights.tolist() == weights.tolist()


@pytest.mark.parametrize("mask", [np.array([1, 0]), np.array([0.5, 1.0]), np.ones((2, 2), dtype=bool), "ab", 3])
def test_only_bools_make_a_mask(mask: Any) -> None:
    with pytest.raises(ValueError, match="kept must be a 1-d array of bool, got"):
        Selection.of_mask(mask)


def test_of_ids_takes_any_order_and_refuses_what_does_not_fit() -> None:
    chosen = Selection.of_ids([4, 0, 2], 6, weights=[4.0, 1.0, 2.0])
    assert (chosen.ids.tolist(), chosen.weights.tolist()) == ([0, 2, 4], [1.0, 2.0, 4.0])
    for message, ids, options in (
        ("ids repeat", [1, 1], {}),
        ("unknown ids", [6], {}),
        ("1-d array of integers", [0.5], {}),
        ("do not fit", [1], {"weights": [1.0, 2.0]}),
        ("weights must be finite", [1], {"weights": [np.nan]}),
        ("weights must be finite", [1], {"weights": [-1.0]}),
        ("weights must be finite", [1], {"weights": [1e39]}),
        ("requested prune ratio", [1], {"requested": 1.0}),
        ("lr_scale", [1], {"lr_scale": 0.0}),
        ("unknown ids", [1], {"forward_only_ids": [6]}),
        ("kept and forward-only", [1], {"forward_only_ids": [0, 1]}),
    ):
        with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
            Selection.of_ids(ids, 6, **options)  # type: ignore[arg-type]


def test_a_selection_cannot_be_written_into() -> None:
    for chosen in (
        Selection.full(3),
        pickle.loads(pickle.dumps(Selection.full(3))),
        copy.deepcopy(Selection.of_ids([1], 3, weights=[2.0])),
        Selection.of_ids([1], 3, weights=[2.0], forward_only_ids=[0]),
        Selection.from_arrays(Selection.full(3).to_arrays()),
        selector().begin_epoch(0),
    ):
        for name in ("codes", "weight_values", "forward_only_ids"):
            with pytest.raises(ValueError, match="read-only"):
                getattr(chosen, name)[...] = 0
        with pytest.raises(AttributeError, match="cannot assign"):
            chosen.requested = 0.5  # type: ignore[misc]


def test_a_method_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "hardest.py").write_text(HARDEST)
    chosen = selector({"name": f"{tmp_path}/hardest.py:Hardest", "keep": 0})
    chosen.begin_epoch(0)
    chosen.observe(np.arange(6), {"loss": np.arange(6.0)}, 0)
    with pytest.raises(RuntimeError, match=r"nothing is kept at prune ratio 0\.5"):
        chosen.begin_epoch(1)
    assert chosen.epoch == 0
    assert chosen.table.times_pruned.tolist() == [0] * 6


def test_intended_drops_that_do_not_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = selector("random")
    kind = type(chosen.method)
    monkeypatch.setattr(kind, "select", lambda *_: Selection.of_mask(np.ones(6, dtype=bool), 0.5, 3))
    with pytest.raises(RuntimeError, match=r"3 samples were to be dropped at prune ratio 0\.5, and none was"):
        chosen.begin_epoch(0)


@pytest.mark.parametrize("as_path", [False, True])
def test_a_method_from_outside(as_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"outside_{'file' if as_path else 'module'}"
    (tmp_path / f"{name}.py").write_text(HARDEST)
    monkeypatch.syspath_prepend(str(tmp_path))
    reference = f"{tmp_path}/{name}.py:Hardest" if as_path else f"{name}:Hardest"
    method = build_method({"name": reference, "keep": 2})
    assert method.to_config() == {"name": reference, "class_floor": 0.0, "keep": 2}
    assert build_method(method.to_config()) == method
    chosen = Selector(method, 6, 8)
    chosen.begin_epoch(0)
    chosen.observe(np.arange(6), {"loss": [3.0, 9, 1, 8, 2, 0]}, 0)
    assert chosen.begin_epoch(1).ids.tolist() == [1, 3]
    file = tmp_path / "state.npz"
    np.savez(file, **chosen.state_dict())  # type: ignore[arg-type]
    with np.load(file, allow_pickle=False) as state:
        restored = Selector(build_method({"name": reference, "keep": 2}), 6, 8)
        restored.load_state_dict(state)
    assert restored.begin_epoch(1).ids.tolist() == [1, 3]
    assert restored.begin_epoch(2).ids.tolist() == [1, 3]
    code = (
        "import sys, numpy as np; from rayprune import Selector, build_method\n"
        "selector = Selector(build_method({'name': sys.argv[1], 'keep': 2}), 6, 8)\n"
        "selector.load_state_dict(dict(np.load(sys.argv[2])))\n"
        "print(selector.begin_epoch(2).ids.tolist())"
    )
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    fresh = subprocess.run([sys.executable, "-c", code, reference, str(file)], env=path, capture_output=True, text=True)
    assert fresh.stdout.strip() == "[1, 3]", fresh.stderr


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module_at_all:Mine", "module 'no_such_module_at_all' is not found"),
        ("rayprune.methods:Ful", r"has no 'Ful': did you mean 'Full'"),
        ("rayprune.core:Selector", "no subclass of rayprune.methods.Method"),
        ("nowhere/mine.py:Mine", "file 'nowhere/mine.py' does not exist"),
        (":Mine", "is not a reference"),
        ("infobach", r"unknown method 'infobach': did you mean 'infobatch'\?"),
    ],
)
def test_bad_references_are_refused(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(reference)


def test_a_reference_to_our_own_class_keeps_its_name() -> None:
    assert build_method("rayprune.methods.infobatch:InfoBatch") == build_method("infobatch")
    assert build_method("infobatch").to_config()["name"] == "infobatch"


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (None, "method = None: must be a name or a mapping"),
        (3, "method = 3: must be a name or a mapping"),
        ({"name": 3}, "method.name = 3: must be text"),
        ({"name": "infobatch", 1: 2}, "unknown key 'method.1' of method 'infobatch'"),
        ({"name": "infobatch", "ema": "abc"}, "method.ema = 'abc': must be a number"),
        ({"name": "infobatch", "ema": True}, "method.ema = True: must be a number"),
        ({"name": "infobatch", "quantiles": 20}, "method.quantiles = 20: must be a list of numbers"),
        ({"name": "infobatch", "target_saving": "abc"}, "method.target_saving = 'abc': must be a number or null"),
        ({"name": "infobatch", "prune_ratio": "abc"}, "method.prune_ratio = 'abc': must be a number, or a mapping"),
        (
            {"name": "infobatch", "prune_ratio": {"schedule": "step", "milestones": 0.5, "ratios": 0.5}},
            "method.prune_ratio.milestones = 0.5: must be a list of numbers",
        ),
        ({"name": "random", "prune_ratio": {"schedule": ["a"]}}, "method.prune_ratio: unknown schedule ['a']"),
        ({"name": "random_epoch", "replacement": "abc"}, "method.replacement = 'abc': must be true or false"),
        ({"name": "random_epoch", "replacement": 3}, "method.replacement = 3: must be true or false"),
        ({"name": "shuffled", "of": 3}, "method.of = 3: must be a name or a mapping"),
        ({"name": "shuffled", "of": {"name": "infobatch", "ema": "x"}}, "method.of.ema = 'x': must be a number"),
        (
            {"name": "infobatch", "quantiles": [50], "keep": [1e-7]},
            "quantiles (50,) must lie in (0, 100), keep (1e-07,)",
        ),
        ({"name": "infobatch", "max_prune_ratio": 0.5}, "max_prune_ratio 0.5 does nothing without target_saving"),
    ],
)
def test_bad_hyperparameters_are_one_line(spec: Any, line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_method(spec)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_method_of_ones_own_is_checked_alike() -> None:
    with pytest.raises(ValueError, match=r"^InfoBatch\.ema = 'abc': must be a number$"):
        InfoBatch(ema="abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [{}, {"prune_ratio": 0.5}])
def test_a_method_without_a_name_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"method has no name: .*valid: .*infobatch"):
        build_method(spec)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.float16(0.25)])
def test_numpy_hyperparameters_become_python_numbers(number: Any) -> None:
    for spec in (
        {"name": "infobatch", "prune_ratio": number, "anneal_start": number, "class_floor": number},
        {"name": "infobatch", "quantiles": [number * 100], "keep": np.array([number])},
        {"name": "random_epoch", "prune_ratio": {"schedule": "linear", "start": number, "end": np.int64(0)}},
        {"name": "shuffled", "of": {"name": "random", "prune_ratio": number}},
    ):
        config = build_method(spec).to_config()
        assert json.loads(json.dumps(config)) == config
        assert build_method(config) == build_method(spec)
        assert hash(build_method(config)) == hash(build_method(spec))
    assert build_method({"name": "infobatch", "prune_ratio": number}).prune_ratio(0, 2) == 0.25  # type: ignore[attr-defined]
