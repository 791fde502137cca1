"""Building methods from configs: references to users' classes, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.methods.infobatch import InfoBatch
from tests.support.paths import ROOT

HARDEST = '''"""Keep the samples of highest loss."""

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
'''


@pytest.mark.parametrize("as_path", [False, True])
def test_a_users_method_selects_and_is_found_again_in_another_process(
    as_path: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"outside_{'file' if as_path else 'module'}"
    (tmp_path / f"{name}.py").write_text(HARDEST)
    monkeypatch.syspath_prepend(str(tmp_path))
    reference = f"{tmp_path}/{name}.py:Hardest" if as_path else f"{name}:Hardest"
    method = build_method({"name": reference, "keep": 2})
    assert method.to_config() == {"name": reference, "class_floor": 0.0, "keep": 2}
    assert build_method(method.to_config()) == method
    selector = Selector(method, 6, 8)
    selector.begin_epoch(0)
    selector.observe(np.arange(6), {"loss": [3.0, 9, 1, 8, 2, 0]}, 0)
    assert selector.begin_epoch(1).ids.tolist() == [1, 3]
    file = tmp_path / "state.npz"
    np.savez(file, **selector.state_dict())  # type: ignore[arg-type]
    code = (
        "import sys, numpy as np; from rayprune import Selector, build_method\n"
        "selector = Selector(build_method({'name': sys.argv[1], 'keep': 2}), 6, 8)\n"
        "selector.load_state_dict(dict(np.load(sys.argv[2])))\n"
        "print(selector.begin_epoch(1).ids.tolist(), selector.begin_epoch(2).ids.tolist())"
    )
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    fresh = subprocess.run([sys.executable, "-c", code, reference, str(file)], env=path, capture_output=True, text=True)
    assert fresh.stdout.strip() == "[1, 3] [1, 3]", fresh.stderr


def test_a_users_method_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "hardest.py").write_text(HARDEST)
    selector = Selector(build_method({"name": f"{tmp_path}/hardest.py:Hardest", "keep": 0}), 6, 8)
    selector.begin_epoch(0)
    selector.observe(np.arange(6), {"loss": np.arange(6.0)}, 0)
    with pytest.raises(RuntimeError, match=r"no sample is kept at prune ratio 0\.5"):
        selector.begin_epoch(1)
    assert selector.epoch == 0
    assert selector.table.times_pruned.tolist() == [0] * 6


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module_at_all:Mine", "module 'no_such_module_at_all' was not found"),
        ("rayprune.methods:Ful", r"has no 'Ful': did you mean 'Full'"),
        ("rayprune.core:Selector", "not a subclass of rayprune.methods.Method"),
        ("nowhere/mine.py:Mine", "file 'nowhere/mine.py' does not exist"),
        (":Mine", "is not a reference"),
        ("infobach", r"unknown method 'infobach': did you mean 'infobatch'\?"),
    ],
)
def test_invalid_references_are_refused(reference: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(reference)


def test_a_reference_to_a_built_in_class_keeps_its_name() -> None:
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
        ({}, "method has no name: choose one of "),
        ({"prune_ratio": 0.5}, "method has no name: choose one of "),
    ],
)
def test_a_mistake_is_one_line(spec: Any, line: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build_method(spec)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_method_built_in_code_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^InfoBatch\.ema = 'abc': must be a number$"):
        InfoBatch(ema="abc")  # type: ignore[arg-type]


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


def test_the_class_of_a_method_can_be_the_first_name_that_a_program_imports() -> None:
    code = "from rayprune import SelectiveBackprop; print(SelectiveBackprop().name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "selective_backprop", done.stderr[-500:]
