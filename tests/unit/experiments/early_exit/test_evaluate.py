"""`rayprune evaluate`: its measurements, files and error messages, on untrained networks and on a trained MSDNet."""

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


def run_evaluate(*words: str | Path) -> Result:
    """Run the command in this process, on a run of this user's own code."""
    return CliRunner().invoke(cli, ["evaluate", *map(str, words), "--trust"])


def assert_refused(done: Result, line: str) -> None:
    assert isinstance(done.exception, ValueError), done.output
    assert line in str(done.exception)
    assert "\n" not in str(done.exception)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with three exits, evaluated in both modes, and the printed text."""
    folder = untrained_run(exits_config(tmp_path_factory.mktemp("runs")))
    done = run_evaluate(folder, "--device", "cpu")
    assert done.exception is None, done.output
    return folder, done.output


def test_both_modes_are_written_and_printed(evaluated: tuple[Path, str]) -> None:
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
    assert "thresholds of 60 held-out training samples" in printed


def test_each_exit_is_evaluated_on_the_sources_own_validation_part(evaluated: tuple[Path, str]) -> None:
    run = open_run(evaluated[0], CPU, trust=True)
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


def test_thresholds_are_found_on_held_out_samples(evaluated: tuple[Path, str]) -> None:
    folder = evaluated[0]
    run = open_run(folder, CPU, trust=True)
    held_out = open_data("digits", limit=301, hold_out=0.2).validation
    assert held_out is not None
    readings = read_exits(run.network, held_out, run.input, CPU, 7)
    stored = json.loads((folder / "exits" / "thresholds.json").read_text())
    assert stored["found_on"] == {"samples": 60, "fingerprint": held_out.fingerprint}
    assert stored["num_exits"] == 3
    for budget in (1, 20, 39):
        np.testing.assert_allclose(read_thresholds(folder, budget), find_thresholds(readings.confidences, budget), 1e-6)
    assert read_thresholds(folder, 20)[-1] == -np.inf


def test_the_cost_of_a_budget_follows_from_its_exit_shares(evaluated: tuple[Path, str]) -> None:
    for row in rows(evaluated[0] / "exits" / "dynamic.csv"):
        macs = [float(each["macs"]) for each in rows(evaluated[0] / "exits" / "anytime.csv")]
        shares = [float(row[f"share_{number}"]) for number in (1, 2, 3)]
        assert sum(shares) == pytest.approx(1.0)
        assert float(row["macs"]) == pytest.approx(np.dot(shares, macs))
        assert sum(int(row[f"held_out_quota_{number}"]) for number in (1, 2, 3)) == 60


def test_without_held_out_samples_only_anytime_is_evaluated(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path, data={"hold_out": None}))
    done = run_evaluate(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "only anytime" in done.output
    assert not (folder / "exits" / "dynamic.csv").exists()
    refused = run_evaluate(folder, "--mode", "dynamic", "--device", "cpu")
    assert "set data.hold_out=0.1 and train again" in str(refused.exception)


def test_files_of_another_checkpoint_are_deleted(tmp_path: Path) -> None:
    config = exits_config(tmp_path)
    folder = untrained_run(config, epoch=2)
    assert run_evaluate(folder, "--device", "cpu").exception is None
    position = json.loads((folder / "checkpoints" / "epoch-000002" / "position.json").read_text())
    (folder / "config.yaml").unlink()
    (folder / "checkpoints").rename(folder / "old")
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder = untrained_run(config, epoch=3, step=5, fingerprint=position["fingerprint"])
    (moved / "exits").rename(folder / "exits")
    done = run_evaluate(folder, "--mode", "anytime", "--device", "cpu")
    assert done.exception is None, done.output
    assert "not finished: evaluating its network after 3 of 4 epochs and 5 steps of the next" in done.output
    remaining = {path.name for path in (folder / "exits").iterdir()}
    assert remaining == {"anytime.csv", "latency.csv", "accuracy_macs.png"}


def test_a_network_that_cannot_stop_early_is_evaluated_at_its_full_cost(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path, TOWER))
    done = run_evaluate(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "can't stop early, each exit takes the whole forward pass" in done.output
    assert len({row["macs"] for row in rows(folder / "exits" / "anytime.csv")}) == 1
    latency = rows(folder / "exits" / "latency.csv")
    assert len({row["median_ms"] for row in latency if row["batch"] == "1"}) == 1


def test_a_latency_is_a_median_with_quartiles(evaluated: tuple[Path, str]) -> None:
    run = open_run(evaluated[0], CPU, trust=True)
    seconds = measure_latency(run.network, run.input.shape, 3, CPU, 2)
    assert seconds.shape[0] == 3
    assert seconds.shape[1] >= 5
    assert (seconds > 0).all()
    latency = rows(evaluated[0] / "exits" / "latency.csv")
    assert [(row["batch"], row["exit"]) for row in latency] == [(b, e) for b in ("1", "64") for e in ("1", "2", "3")]
    for row in latency:
        assert 0 < float(row["low_ms"]) <= float(row["median_ms"]) <= float(row["high_ms"])
        assert int(row["repeats"]) >= 5


def change_epochs(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("epochs: 4", "epochs: 5"))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            lambda run: (run / "checkpoints" / "epoch-000004" / "manifest.json").unlink(),
            "no intact checkpoint yet: train it first",
        ),
        (change_epochs, "is not the config of its checkpoints"),
        (lambda run: (run / "config.yaml").write_text("train: {epochs: no}"), "config.yaml can't be read"),
        (lambda run: (run / "config.yaml").unlink(), "is not a run folder"),
        (lambda run: (run / "config.yaml").rename(run / "sweep.yaml"), "is a sweep: name one of its trials/"),
    ],
)
def test_a_folder_that_is_not_an_intact_run_is_refused(tmp_path: Path, damage: Any, line: str) -> None:
    folder = untrained_run(exits_config(tmp_path))
    damage(folder)
    assert_refused(run_evaluate(folder, "--device", "cpu"), line)


@pytest.mark.parametrize(
    ("model", "position", "line"),
    [
        (LADDER, {"fingerprint": "0" * 64}, "trained on other data (fingerprint 000000000000"),
        ("mlp", {}, "model 'mlp' has one exit"),
    ],
)
def test_other_data_and_networks_with_one_exit_are_refused(
    tmp_path: Path, model: str, position: dict[str, Any], line: str
) -> None:
    folder = untrained_run(exits_config(tmp_path, model), **position)
    assert_refused(run_evaluate(folder, "--device", "cpu"), line)


def arrays_config(tmp_path: Path, **keys: Any) -> Config:
    """Return the config of a run on a file with 40 images of four classes."""
    tmp_path.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "data.npz", x=images, y=np.arange(40) % 4)
    data = {"source": "arrays", "path": str(tmp_path / "data.npz"), "hold_out": 0.2, **keys}
    return exits_config(tmp_path / "runs", data=data)


def test_missing_data_is_named(tmp_path: Path) -> None:
    folder = untrained_run(arrays_config(tmp_path))
    (tmp_path / "data.npz").unlink()
    assert_refused(run_evaluate(folder, "--device", "cpu"), "restore it, or name its new place, data.path=…")


def test_data_are_evaluated_at_their_new_place(tmp_path: Path) -> None:
    folder = untrained_run(arrays_config(tmp_path))
    moved = (tmp_path / "data.npz").rename(tmp_path / "moved.npz")
    done = run_evaluate(folder, f"data.path={moved}", "--mode", "anytime", "--device", "cpu")
    assert done.exception is None, done.output
    assert_refused(run_evaluate(folder, "train.seed=1", "--device", "cpu"), "train.seed would change what was trained")


def test_without_a_validation_part_the_exits_are_evaluated_on_the_held_out_samples(tmp_path: Path) -> None:
    folder = untrained_run(arrays_config(tmp_path, validation_fraction=0.0))
    done = run_evaluate(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "on the 8 held-out training samples" in done.output
    assert [row["top5"] for row in rows(folder / "exits" / "anytime.csv")] == ["1.0"] * 3  # of four classes
    assert_refused(run_evaluate(folder, "--mode", "dynamic", "--device", "cpu"), "no validation part of its own")
    other = untrained_run(arrays_config(tmp_path / "other", validation_fraction=0.0, hold_out=None))
    assert_refused(run_evaluate(other, "--device", "cpu"), "has no validation part, and the run held out no samples")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path))
    weights = folder / "checkpoints" / "epoch-000004" / "model.pt"
    torch.save({"layers.0.weight": torch.zeros(1)}, weights)
    manifest = weights.with_name("manifest.json")
    sums = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sums, "model.pt": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    assert_refused(run_evaluate(folder, "--device", "cpu"), "can't be applied")


def test_mistakes_exit_with_2_and_one_line(tmp_path: Path) -> None:
    for words in ([str(tmp_path / "nothing")], [str(tmp_path)], [str(tmp_path), "--mode", "dynmic"]):
        done = rayprune("evaluate", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_unknown_folders_modes_and_devices_are_refused(tmp_path: Path) -> None:
    assert_refused(run_evaluate(tmp_path / "nothing"), "there is no folder")
    assert "'anytime', 'dynamic'" in run_evaluate(tmp_path, "--mode", "dynmic").output
    with pytest.raises(ValueError, match="did you mean 'dynamic'"):
        evaluate(tmp_path, "dynmic", CPU, on_notice=print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'gpu' can't be used"):
        find_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused() -> None:
    assert find_device("auto") == CPU
    with pytest.raises(ValueError, match="finds no GPU here, use --device cpu"):
        find_device("cuda:0")


def test_a_network_that_returns_nan_has_no_thresholds(tmp_path: Path) -> None:
    folder = untrained_run(exits_config(tmp_path))
    run = open_run(folder, CPU, trust=True)
    with torch.no_grad():
        run.network.heads[0].bias.fill_(float("nan"))
    assert run.held_out is not None
    readings = read_exits(run.network, run.held_out, run.input, CPU, 16)
    with pytest.raises(ValueError, match="NaN for 60 of 60 samples"):
        find_thresholds(readings.confidences, 20)


def test_the_batch_size_does_not_change_the_results(evaluated: tuple[Path, str], tmp_path: Path) -> None:
    run = open_run(evaluated[0], CPU, trust=True)
    assert run.validation is not None
    one, other = (read_exits(run.network, run.validation, run.input, CPU, size) for size in (360, 37))
    np.testing.assert_allclose(one.confidences, other.confidences, rtol=1e-5)
    assert (one.correct == other.correct).mean() > 0.999
    whole = evaluate(evaluated[0], "anytime", CPU, batch_size=11, trust=True, on_notice=print)
    assert whole.anytime[0]["samples"] == 360


MODEL = {"num_blocks": 3, "channels": 8, "growth_rate": 4}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run of four epochs."""
    config = exits_config(tmp_path_factory.mktemp("runs"), "msdnet", model=MODEL, optim={"lr": 0.1})
    folder = train(config).folder
    done = run_evaluate(folder, "--device", "cpu")
    assert done.exception is None, done.output
    assert "msdnet after 4 of 4 epochs" in done.output
    return folder


def test_the_predictions_match_the_runs_own_validation(trained: Path) -> None:
    run, last = open_run(trained, CPU, trust=True), read_metrics(trained)[-1]
    assert run.held_out is not None
    readings = read_exits(run.network, run.held_out, run.input, CPU, 32)
    assert last["val_accuracy"] > 0.3
    np.testing.assert_allclose(readings.correct.mean(axis=1), last["val_exit_accuracy"], atol=1e-6)
    np.testing.assert_allclose(readings.losses.mean(axis=1), last["val_exit_loss"], rtol=1e-4)


def test_the_result_of_a_budget_matches_inference_with_early_exit(trained: Path) -> None:
    run = open_run(trained, CPU, trust=True)
    assert run.validation is not None
    everything = run.validation.take(np.arange(len(run.validation)))
    inputs, labels = run.input.augment.evaluate(torch.from_numpy(everything["image"])), everything["label"]
    dynamic = rows(trained / "exits" / "dynamic.csv")
    macs = json.loads((trained / "exits" / "thresholds.json").read_text())["macs"]
    assert macs == sorted(set(macs))
    for row in dynamic[::6]:
        lazy = EarlyExit(run.network, read_thresholds(trained, int(row["p"])).tolist())
        logits, exits = lazy.predict(inputs)
        # In a batch of another size, a confidence at the threshold may be rounded to its other side.
        assert float((logits.argmax(1).numpy() == labels).mean()) == pytest.approx(float(row["top1"]), abs=2 / 360)
        assert np.mean([macs[exit_] for exit_ in exits]) == pytest.approx(float(row["macs"]), rel=0.01)


def test_the_code_of_the_documentation_runs(trained: Path) -> None:
    page = ROOT / "docs" / "early_exit.md"
    *_, block = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    run = open_run(trained, CPU, trust=True)
    names = {"network": run.network, "inputs": torch.zeros(2, *run.input.shape)}
    exec(block.replace("runs/NAME", str(trained)), names)
    assert tuple(names["logits"].shape) == (2, 10)


def test_larger_budgets_cost_more(trained: Path) -> None:
    costs = [float(row["held_out_macs"]) for row in rows(trained / "exits" / "dynamic.csv")]
    assert costs[0] < costs[19] < costs[38]


def test_an_unfinished_run_is_evaluated_at_its_newest_checkpoint(tmp_path: Path) -> None:
    config = exits_config(tmp_path, "msdnet", model=MODEL, train={"epochs": 3, "stop_after": 1})
    folder = train(config).folder
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("stop_after: 1", "stop_after: null"))  # as if it had been killed
    done = run_evaluate(folder, "--mode", "anytime", "--device", "cpu")
    assert done.exception is None, done.output
    assert "the run is not finished: evaluating its network after 1 of 3 epochs" in done.output
