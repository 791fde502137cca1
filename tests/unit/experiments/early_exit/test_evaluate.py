"""`rayprune evaluate`: what it measures, writes and refuses, on networks that need no training.

`rayprune evaluate` on an MSDNet that a run has trained: the run's own figures, and inference that really stops.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch.nn import functional

from rayprune.cli.main import cli
from rayprune.config import Config
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.driver import train
from rayprune.experiments.early_exit.evaluate import evaluate, find_device, open_run
from rayprune.experiments.early_exit.profile import measure_latency, read_exits, read_thresholds
from rayprune.experiments.early_exit.thresholds import find_thresholds
from rayprune.nn.early_exit import EarlyExit
from rayprune.sources import open_data
from tests.support.command_line import rayprune
from tests.support.exit_runs import LADDER, TOWER, exits_config, untrained_run
from tests.support.paths import ROOT

CPU = torch.device("cpu")


def inside(*words: str | Path) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli, ["evaluate", *map(str, words)])


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three exits, evaluated both ways, and what was printed."""
    folder = untrained_run(exits_config(tmp_path_factory.mktemp("runs")))
    done = inside(folder, "--device", "cpu")
    assert done.exception is None, done.output
    return folder, done.output


def test_both_ways_are_written_and_printed(evaluated: tuple[Path, str]) -> None:
    folder, printed = evaluated
    names = {"anytime.csv", "dynamic.csv", "latency.csv", "thresholds.json", "accuracy_macs.png"}
    assert {path.name for path in (folder / "exits").iterdir()} == names
    assert (folder / "exits" / "accuracy_macs.png").read_bytes().startswith(b"\x89PNG")
    anytime = rows(folder / "exits" / "anytime.csv")
    assert [row["exit"] for row in anytime] == ["1", "2", "3"]
    for row in anytime:
        assert f"{float(row['top1']):.2%}" in printed
        assert f"{float(row['loss']):.4f}" in printed
    assert len(rows(folder / "exits" / "dynamic.csv")) == 39
    assert "after 4 of 4 epochs, on the 360 validation samples of digits" in printed
    assert "thresholds of 60 training samples held out" in printed


def test_each_exit_is_judged_on_the_sources_own_validation_part(evaluated: tuple[Path, str]) -> None:
    run = open_run(evaluated[0], CPU)
    test = open_data("digits").validation
    assert test is not None
    everything = test.take(np.arange(len(test)))
    labels = torch.from_numpy(everything["label"])
    with torch.no_grad():
        exits = run.network(run.input.augment.evaluate(torch.from_numpy(everything["image"])))
    for row, logits in zip(rows(evaluated[0] / "exits" / "anytime.csv"), exits, strict=True):
        best = logits.argsort(dim=1, descending=True)
        assert float(row["top1"]) == pytest.approx(float((best[:, 0] == labels).float().mean()), abs=1e-6)
        assert float(row["top5"]) == pytest.approx(
            float((best[:, :5] == labels[:, None]).any(1).float().mean()), abs=1e-6
        )
        assert float(row["loss"]) == pytest.approx(float(functional.cross_entropy(logits, labels)), abs=1e-5)


def test_thresholds_are_of_samples_that_the_run_was_not_trained_on(evaluated: tuple[Path, str]) -> None:
    folder = evaluated[0]
    run = open_run(folder, CPU)
    held_out = open_data("digits", limit=301, hold_out=0.2).validation
    assert held_out is not None
    readings = read_exits(run.network, held_out, run.input, CPU, 7)
    stored = json.loads((folder / "exits" / "thresholds.json").read_text())
    assert stored["found_on"] == {"samples": 60, "fingerprint": held_out.fingerprint}
    assert stored["num_exits"] == 3
    for budget in (1, 20, 39):
        np.testing.assert_allclose(read_thresholds(folder, budget), find_thresholds(readings.confidences, budget), 1e-6)
    assert read_thresholds(folder, 20)[-1] == -np.inf


def test_a_dynamic_row_is_what_the_shares_say(evaluated: tuple[Path, str]) -> None:
    for row in rows(evaluated[0] / "exits" / "dynamic.csv"):
        macs = [float(each["macs"]) for each in rows(evaluated[0] / "exits" / "anytime.csv")]
        shares = [float(row[f"share_{number}"]) for number in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1.0)
        assert float(row["macs"]) == pytest.approx(np.dot(shares, macs))
        assert sum(int(row[f"held_out_quota_{number}"]) for number in (1, 2, 3)) == 60


def test_without_samples_held_out_only_each_exit_is_judged(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path, data={"hold_out": None}))
    done = inside(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "only anytime" in done.output
    assert not (folder / "exits" / "dynamic.csv").exists()
    refused = inside(folder, "--mode", "dynamic", "--device", "cpu")
    assert "set data.hold_out=0.1 and train again" in str(refused.exception)


def test_what_another_checkpoint_left_is_deleted(tmp_path: Path) -> None:
    config = exits_config(tmp_path)
    folder = untrained_run(config, epoch=2)
    assert inside(folder, "--device", "cpu").exception is None
    position = json.loads((folder / "checkpoints" / "epoch-000002" / "position.json").read_text())
    (folder / "config.yaml").unlink()
    (folder / "checkpoints").rename(folder / "old")
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder = untrained_run(config, epoch=3, step=5, fingerprint=position["fingerprint"])
    (moved / "exits").rename(folder / "exits")
    done = inside(folder, "--mode", "anytime", "--device", "cpu")
    assert done.exception is None, done.output
    assert "not finished: this is its network after 3 of 4 epochs and 5 steps of the next" in done.output
    left = {path.name for path in (folder / "exits").iterdir()}
    assert left == {"anytime.csv", "latency.csv", "accuracy_macs.png"}


def test_a_network_that_cannot_stop_early_is_judged_all_the_same(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path, TOWER))
    done = inside(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "can't stop early, each exit takes the whole forward" in done.output
    assert len({row["macs"] for row in rows(folder / "exits" / "anytime.csv")}) == 1
    latency = rows(folder / "exits" / "latency.csv")
    assert len({row["median_ms"] for row in latency if row["batch"] == "1"}) == 1


def test_a_latency_is_a_median_with_its_quartiles(evaluated: tuple[Path, str]) -> None:
    run = open_run(evaluated[0], CPU)
    seconds = measure_latency(run.network, run.input.shape, 3, CPU, 2)
    assert seconds.shape[0] == 3
    assert seconds.shape[1] >= 5
    assert (seconds > 0).all()
    latency = rows(evaluated[0] / "exits" / "latency.csv")
    assert [(row["batch"], row["exit"]) for row in latency] == [(b, e) for b in ("1", "64") for e in ("1", "2", "3")]
    for row in latency:
        assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert int(row["repeats"]) >= 5


def without_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "epoch-000004" / "manifest.json").unlink()


def another_config(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("epochs: 4", "epochs: 5"))


def broken_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("train: {epochs: no}")


def no_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def a_sweep(folder: Path) -> None:
    (folder / "config.yaml").rename(folder / "sweep.yaml")


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (without_checkpoint, "no sound checkpoint yet: train it first"),
        (another_config, "is not what its checkpoints were trained with"),
        (broken_config, "config.yaml can't be read"),
        (no_config, "is not a run folder"),
        (a_sweep, "is a sweep: name one of its trials/"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_refused(tmp_path: Path, spoil: Any, line: str) -> None:
    folder = untrained_run(exits_config(tmp_path))
    spoil(folder)
    assert_refused(inside(folder, "--device", "cpu"), line)


@pytest.mark.parametrize(
    ("model", "position", "line"),
    [
        (LADDER, {"fingerprint": "0" * 64}, "trained on other data (fingerprint 000000000000"),
        ("mlp", {}, "model 'mlp' has one exit"),
    ],
)
def test_other_data_and_networks_of_one_exit_are_refused(
    tmp_path: Path, model: str, position: dict[str, Any], line: str
) -> None:
    folder = untrained_run(exits_config(tmp_path, model), **position)
    assert_refused(inside(folder, "--device", "cpu"), line)


def arrays_config(tmp_path: Path, **keys: Any) -> Config:
    """Return a run on 40 images of four classes in a file."""
    tmp_path.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=np.arange(40) % 4)
    data = {"source": "arrays", "path": str(tmp_path / "data.npz"), "hold_out": 0.2, **keys}
    return exits_config(tmp_path / "runs", data=data)


def test_data_that_are_gone_are_named(tmp_path: Path) -> None:
    folder = untrained_run(arrays_config(tmp_path))
    (tmp_path / "data.npz").unlink()
    assert_refused(inside(folder, "--device", "cpu"), "bring it back, or say in")


def test_without_a_validation_part_each_exit_is_judged_on_the_samples_held_out(tmp_path: Path) -> None:
    folder = untrained_run(arrays_config(tmp_path, validation_fraction=0.0))
    done = inside(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "on the 8 training samples held out" in done.output
    assert [row["top5"] for row in rows(folder / "exits" / "anytime.csv")] == ["1.0"] * 3  # of four classes
    assert_refused(inside(folder, "--mode", "dynamic", "--device", "cpu"), "no validation part of its own")
    other = untrained_run(arrays_config(tmp_path / "other", validation_fraction=0.0, hold_out=None))
    assert_refused(inside(other, "--device", "cpu"), "has no validation part, and the run held nothing out")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path))
    weights = folder / "checkpoints" / "epoch-000004" / "model.pt"
    torch.save({"layers.0.weight": torch.zeros(1)}, weights)
    manifest = weights.with_name("manifest.json")
    sums = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sums, "model.pt": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    assert_refused(inside(folder, "--device", "cpu"), "don't fit model")


def test_mistakes_exit_with_2_and_one_line(tmp_path: Path) -> None:
    for words in ([str(tmp_path / "nothing")], [str(tmp_path)], [str(tmp_path), "--mode", "dynmic"]):
        done = rayprune("evaluate", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def assert_refused(done: Result, line: str) -> None:
    assert isinstance(done.exception, ValueError), done.output
    assert line in str(done.exception)
    assert "\n" not in str(done.exception)


def test_no_folder_no_such_mode_and_no_such_device(tmp_path: Path) -> None:
    assert_refused(inside(tmp_path / "nothing"), "there is no folder")
    assert "'anytime', 'dynamic'" in inside(tmp_path, "--mode", "dynmic").output
    with pytest.raises(ValueError, match="did you mean 'dynamic'"):
        evaluate(tmp_path, "dynmic", CPU, on_notice=print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'gpu' can't be used"):
        find_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_is_not_promised() -> None:
    assert find_device("auto") == CPU
    with pytest.raises(ValueError, match="finds no GPU here, give --device cpu"):
        find_device("cuda:0")


def test_networks_that_are_nan_have_no_thresholds(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path))
    run = open_run(folder, CPU)
    with torch.no_grad():
        run.network.heads[0].bias.fill_(float("nan"))
    assert run.held_out is not None
    readings = read_exits(run.network, run.held_out, run.input, CPU, 16)
    with pytest.raises(ValueError, match="NaN for 60 of 60 samples"):
        find_thresholds(readings.confidences, 20)


def test_the_batch_size_changes_nothing(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    run = open_run(evaluated[0], CPU)
    assert run.validation is not None
    one, other = (read_exits(run.network, run.validation, run.input, CPU, size) for size in (360, 37))
    np.testing.assert_allclose(one.confidences, other.confidences, rtol=1e-5)
    assert (one.correct == other.correct).mean() > 0.999
    assert evaluate(evaluated[0], "anytime", CPU, batch_size=11, on_notice=print).anytime[0]["samples"] == 360


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
    page = ROOT / "docs" / "early_exit.md"
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
