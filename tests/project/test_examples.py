"""The examples of training loops without Ray: they learn, they prune, and they say so."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.paths import ROOT

FOLDER = ROOT / "examples"
NAMES = ("language_model", "tabular_regression", "text_classification")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def learned(name: str, found: dict[str, Any], run: str) -> bool:
    """Say whether a run is clearly better than one that has learned nothing of its inputs."""
    if name == "language_model":
        return bool(found[run]["loss"] < found["baseline"] - 0.4)
    if name == "tabular_regression":
        return bool(found[run]["r2"] > 0.3)
    return bool(found[run]["accuracy"] > 0.7)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns_and_prunes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = module(name)
    found = example.main()
    columns, held_out = example.load()
    num_samples = len(next(iter(columns.values())))
    assert found["full"]["trained"] == num_samples * example.EPOCHS
    assert 0.1 < found["saved"] < 0.5
    assert found["pruned"]["trained"] == round((1 - found["saved"]) * found["full"]["trained"])
    assert all(math.isfinite(value) for run in ("full", "pruned") for value in found[run].values())
    assert learned(name, found, "full")
    assert learned(name, found, "pruned")
    printed = capsys.readouterr().out
    assert str(found["pruned"]["trained"]) in printed
    assert f"{found['saved']:.0%} fewer" in printed
    assert len(next(iter(held_out.values()))) == example.HELD_OUT


def test_the_network_that_is_left_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = module("early_exit").main(str(tmp_path))
    assert found["leaving_early"] > 0.9
    assert found["last_exit"] > 0.95
    assert found["share_of_macs"] < 0.6
    assert 0.1 < found["saved"] < 0.5
    assert "leave at the first exit" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_row_is_trained_on(name: str) -> None:
    """Lines of both libraries, or of words with one checksum, can have the same tokens: hardly any do."""
    columns, held_out = module(name).load()
    data = next(key for key in columns if key != "label")
    known = {row.tobytes() for row in columns[data]}
    both = sum(row.tobytes() in known for row in held_out[data])
    assert both <= 0.01 * len(held_out[data])
