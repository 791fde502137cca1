"""`rayprune evaluate` on an MSDNet that a run has trained: the run's own figures, and inference that really stops."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from exit_runs import exits_config
from test_evaluate import CPU, inside, rows

from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import train
from rayprune.experiments.early_exit.evaluate import open_run
from rayprune.experiments.early_exit.profile import read_exits, read_thresholds
from rayprune.nn.early_exit import EarlyExit

MODEL = {"num_blocks": 3, "channels": 8, "growth_rate": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs that is evaluated."""
    config = exits_config(tmp_path_factory.mktemp("runs"), "msdnet", model=MODEL, optim={"lr": 0.1})
    folder = train(config).folder
    done = inside(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "msdnet after 4 of 4 epochs" in done.output
    return folder


def test_on_its_validation_samples_the_network_is_what_the_run_said(trained: Path) -> None:
    run, last = open_run(trained, CPU), read_metrics(trained)[-1]
    assert run.held_out is not None
    found = read_exits(run.network, run.held_out, run.input, CPU, 32)
    assert last["val_accuracy"] > 0.3
    np.testing.assert_allclose(found.correct.mean(axis=1), last["val_exit_accuracy"], atol=1e-6)
    np.testing.assert_allclose(found.losses.mean(axis=1), last["val_exit_loss"], rtol=1e-4)


def test_a_dynamic_row_is_what_inference_that_stops_early_gives(trained: Path) -> None:
    run = open_run(trained, CPU)
    assert run.validation is not None
    everything = run.validation.take(np.arange(len(run.validation)))
    inputs, labels = run.input.augment.evaluate(torch.from_numpy(everything["image"])), everything["label"]
    dynamic = rows(trained / "exits" / "dynamic.csv")
    macs = json.loads((trained / "exits" / "thresholds.json").read_text())["macs"]
    assert macs == sorted(set(macs))
    for row in dynamic[::6]:
        lazy = EarlyExit(run.network, read_thresholds(trained, int(row["p"])).tolist())
        logits, exits = lazy.predict(inputs)
        # A confidence at its threshold may be rounded to the other side in a batch of another size.
        assert float((logits.argmax(1).numpy() == labels).mean()) == pytest.approx(float(row["top1"]), abs=2 / 360)
        assert np.mean([macs[exit_] for exit_ in exits]) == pytest.approx(float(row["macs"]), rel=0.01)


def test_the_pages_python_runs(trained: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "early_exit.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    run = open_run(trained, CPU)
    names = {"network": run.network, "inputs": torch.zeros(2, *run.input.shape)}
    exec(block.replace("runs/NAME", str(trained)), names)
    assert tuple(names["logits"].shape) == (2, 10)


def test_more_for_early_exits_costs_less(trained: Path) -> None:
    costs = [float(row["held_out_macs"]) for row in rows(trained / "exits" / "dynamic.csv")]
    assert costs[0] < costs[19] < costs[38]


def test_a_run_that_is_not_finished_is_judged_as_far_as_it_is(tmp_path: Path) -> None:
    config = exits_config(tmp_path, "msdnet", model=MODEL, train={"epochs": 3, "stop_after": 1})
    folder = train(config).folder
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("stop_after: 1", "stop_after: null"))  # as before it was stopped
    done = inside(folder, "--mode", "anytime", "--device", "cpu")
    assert done.exception is None, done.output
    assert "the run is not finished: this is its network after 1 of 3 epochs" in done.output
