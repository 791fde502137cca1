"""Whole runs in this process: counts, gradients, reproducibility, and the files of the run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from rayprune.config import Config
from rayprune.core import Plan, Selector
from rayprune.core.table import QUANTILES
from rayprune.engine.storage.run_folder import read_selection, read_validation
from rayprune.engine.train.driver import RunResult, train
from rayprune.engine.train.preflight import input_spec
from rayprune.errors import RunFolderError, TrainingFailed
from rayprune.nn.models import build_model
from rayprune.nn.steps import PlainStep
from rayprune.sources import open_data
from rayprune.sources.tables.audits import AuditTable, write_audit
from tests.support.runs import (
    RESULT_KEYS,
    assert_same_run,
    results,
    run_config,
    same_weights,
    scores_of,
    user,
    weights_of,
)

NUM_SAMPLES, BATCH, EPOCHS = 301, 32, 4


@pytest.fixture(scope="module")
def infobatch(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """One finished run of InfoBatch that several tests look at."""
    return train(run_config(tmp_path_factory.mktemp("runs")))


def plans_of(result: RunResult, last_batch: Any = "pad") -> list[Plan]:
    """Lay out the stored selections anew."""
    return [
        Plan.of_selection(read_selection(result.folder, epoch), BATCH, 0, epoch, last_batch) for epoch in range(EPOCHS)
    ]


def cumulative(result: RunResult, key: str) -> list[int]:
    return [line[key] for line in result.metrics]


# What is counted


def test_trained_and_padded_rows_match_the_plans(infobatch: RunResult) -> None:
    plans = plans_of(infobatch)
    assert [line["plan_hash"] for line in infobatch.metrics] == [plan.hash for plan in plans]
    assert cumulative(infobatch, "samples_trained") == np.cumsum([plan.num_rows for plan in plans]).tolist()
    padded = [plan.num_steps * BATCH - plan.num_rows for plan in plans]
    assert cumulative(infobatch, "samples_padded") == np.cumsum(padded).tolist()
    assert cumulative(infobatch, "samples_forwarded") == [0] * EPOCHS
    assert sum(padded) > 0
    assert plans[1].num_rows < NUM_SAMPLES


def test_a_run_in_this_process_leaves_its_number_of_threads_alone(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(run_config(tmp_path, train={"epochs": 1}, scaling={"threads": before + 1}))
    assert torch.get_num_threads() == before


def test_dropping_the_last_batch_trains_on_whole_batches(tmp_path: Path) -> None:
    result = train(run_config(tmp_path, train={"last_batch": "drop"}))
    plans = plans_of(result, "drop")
    assert [line["plan_hash"] for line in result.metrics] == [plan.hash for plan in plans]
    assert cumulative(result, "samples_trained") == np.cumsum([plan.num_steps * BATCH for plan in plans]).tolist()
    assert cumulative(result, "samples_trained")[0] == NUM_SAMPLES // BATCH * BATCH
    assert cumulative(result, "samples_padded") == [0] * EPOCHS
    # What the dropped batch held was kept and not visited.
    assert (scores_of(result.folder)["last_visit"] == 0).sum() <= 2 * NUM_SAMPLES // BATCH * BATCH


def half_run(tmp_path: Path, name: str, **fields: Any) -> RunResult:
    """Train on the lower half of the ids, with plain SGD."""
    method = {"name": user("LowerHalf"), **fields}
    return train(run_config(tmp_path, name, method=method, optim={"lr": 0.02, "momentum": 0.0, "weight_decay": 0.0}))


def test_forward_only_samples_are_scored_and_counted_separately(tmp_path: Path) -> None:
    looks, plain = half_run(tmp_path, "looks", looks=7), half_run(tmp_path, "plain")
    assert cumulative(looks, "samples_forwarded") == [0, 7, 7, 7]
    assert cumulative(looks, "samples_trained") == [301, 451, 601, 751] == cumulative(plain, "samples_trained")
    assert scores_of(looks.folder)["last_visit"].tolist() == [3] * 150 + [0] * 144 + [1] * 7
    assert scores_of(plain.folder)["last_visit"].tolist() == [3] * 150 + [0] * 151
    assert np.array_equal(read_selection(looks.folder, 1).forward_only_ids, np.arange(300, 293, -1))
    assert same_weights(looks.folder, plain.folder), "a second look trains"


def test_lr_scale_applies_to_its_epoch_only(tmp_path: Path) -> None:
    scaled, plain = half_run(tmp_path, "scaled", lr_scale=0.5), half_run(tmp_path, "plain")
    ratios = [one["lr"] / other["lr"] for one, other in zip(scaled.metrics, plain.metrics, strict=True)]
    assert ratios == [1.0, 0.5, 1.0, 1.0]
    assert scaled.metrics[0]["train_loss"] == plain.metrics[0]["train_loss"]
    assert scaled.metrics[2]["train_loss"] != plain.metrics[2]["train_loss"]


def test_weights_reach_the_gradient(tmp_path: Path) -> None:
    # Without momentum and weight decay, weight 2 is the same as twice the rate, bit for bit.
    weighted, faster = half_run(tmp_path, "weighted", weight=2.0), half_run(tmp_path, "faster", lr_scale=2.0)
    assert same_weights(weighted.folder, faster.folder)
    assert not same_weights(weighted.folder, half_run(tmp_path, "plain").folder)
    losses = [[line["train_loss"] for line in run.metrics] for run in (weighted, faster)]
    assert losses[0] == losses[1], "the loss that is shown and stored is the raw one"


# What decides the result


@pytest.mark.parametrize("model", ["mlp", "resnet8"])
def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, model: str) -> None:
    first, second = (train(run_config(tmp_path, name, model={"name": model})) for name in ("first", "second"))
    assert_same_run(first, second)


def test_another_seed_gives_another_run(tmp_path: Path, infobatch: RunResult) -> None:
    other = train(run_config(tmp_path, train={"seed": 1}))
    assert not same_weights(other.folder, infobatch.folder)
    hashes = [{line["plan_hash"] for line in run.metrics} for run in (other, infobatch)]
    assert len(hashes[0] | hashes[1]) == 2 * EPOCHS


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path, infobatch: RunResult) -> None:
    split = train(run_config(tmp_path, train={"accumulate": 2}))
    assert split.metrics[0]["plan_hash"] == infobatch.metrics[0]["plan_hash"]
    assert split.metrics[0]["train_loss"] == pytest.approx(infobatch.metrics[0]["train_loss"], rel=1e-5)
    # In double precision the two differ by rounding only, whatever the weights and the number of steps.
    assert_close_after_steps(accumulate=2)


def assert_close_after_steps(accumulate: int) -> None:
    rng = np.random.default_rng(0)
    models = [small_model() for _ in range(2)]
    steps = [
        PlainStep(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), accumulate=parts)
        for model, parts in zip(models, (1, accumulate), strict=True)
    ]
    for _ in range(5):
        inputs, targets = torch.from_numpy(rng.random((8, 6))), torch.from_numpy(rng.integers(0, 3, 8))
        weights = torch.from_numpy(rng.choice([0.0, 1.0, 2.0], 8))
        whole, parts = (step(inputs, targets, weights) for step in steps)
        torch.testing.assert_close(whole["loss"], parts["loss"], rtol=1e-5, atol=1e-6)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("mlp", num_classes=3, input_shape=(6,), hidden=[5]).double()


def test_the_gradient_is_the_weighted_sum_over_a_constant() -> None:
    inputs, targets = torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    weights = torch.tensor([2.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    model, by_hand = small_model(), small_model()
    PlainStep(model, torch.optim.SGD(model.parameters(), lr=0.0))(inputs, targets, weights)
    for row in range(4):
        loss = functional.cross_entropy(by_hand(inputs[row : row + 1]), targets[row : row + 1])
        (weights[row] * loss / 4).backward()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_label_smoothing_is_part_of_the_stored_loss(tmp_path: Path) -> None:
    # A single step: every stored loss is that of the initial network, whose weights the seed gives.
    config = run_config(
        tmp_path,
        data={"augment": {"crop": 0, "flip": False}},
        train={"epochs": 1, "batch_size": NUM_SAMPLES, "label_smoothing": 0.2},
    )
    stored = scores_of(train(config).folder)["loss"].to_numpy()
    torch.manual_seed(0)
    logits, targets = outputs(config, open_data("digits", limit=NUM_SAMPLES).train)
    smoothed, plain = (
        functional.cross_entropy(logits, targets, reduction="none", label_smoothing=share).numpy() for share in (0.2, 0)
    )
    np.testing.assert_allclose(stored, smoothed, rtol=1e-4)
    assert not np.allclose(stored, plain, rtol=1e-2)


@pytest.mark.parametrize("stream", ["local", "device"])
def test_a_network_sees_resized_crops_of_the_stored_images(tmp_path: Path, stream: str) -> None:
    config = run_config(
        tmp_path,
        data={"augment": {"resized_crop": 6, "scale": [0.3, 1.0], "flip": True}},
        train={"epochs": 1, "batch_size": NUM_SAMPLES},
        scaling={"stream": stream},
    )
    result = train(config)
    source = open_data("digits", limit=NUM_SAMPLES).train
    spec, ids = input_spec(config, source), np.arange(NUM_SAMPLES)
    assert spec.shape == (1, 6, 6)
    torch.manual_seed(0)
    model = build_model("mlp", num_classes=10, input_shape=spec.shape)
    draws = spec.augment.draws(ids, (1, 8, 8), seed=0, epoch=0)
    assert draws is not None
    columns = source.take(ids)
    with torch.no_grad():
        logits = model(spec.augment.train(torch.from_numpy(columns["image"]), torch.from_numpy(draws)))
    expected = functional.cross_entropy(logits, torch.from_numpy(columns["label"]), reduction="none")
    np.testing.assert_allclose(scores_of(result.folder)["loss"], expected, rtol=1e-4)


def outputs(config: Config, source: Any, weights: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an MLP's logits of a whole source in eval mode, and the labels."""
    spec = input_spec(config, open_data("digits", limit=NUM_SAMPLES).train)
    model = build_model("mlp", num_classes=10, input_shape=spec.shape)
    if weights is not None:
        model.load_state_dict(weights)
    columns = source.take(np.arange(len(source)))
    with torch.no_grad():
        logits = model(spec.augment.evaluate(torch.from_numpy(columns["image"])))
    return logits, torch.from_numpy(columns["label"])


def test_the_error_of_a_broken_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"^training failed on rank 0: ValueError: this model is broken$"):
        train(run_config(tmp_path, model={"name": user("broken")}))


# What the run folder holds


def test_saved_selections_are_those_of_the_selector(infobatch: RunResult) -> None:
    config = run_config(infobatch.folder.parent)
    selector = Selector(config.build_method(), NUM_SAMPLES, EPOCHS, 0)
    first = selector.begin_epoch(0)
    stored = [read_selection(infobatch.folder, epoch) for epoch in range(EPOCHS)]
    assert np.array_equal(stored[0].codes, first.codes)
    assert [s.realised for s in stored] == [line["pruned_fraction"] for line in infobatch.metrics]
    assert [s.requested for s in stored] == [line["requested_prune_ratio"] for line in infobatch.metrics]
    assert [s.num_kept for s in stored] == [line["kept"] for line in infobatch.metrics]
    pruned = np.sum([s.codes == 0 for s in stored], axis=0)
    assert scores_of(infobatch.folder)["times_pruned"].tolist() == pruned.tolist()
    last_visit = np.max([np.where(s.codes > 0, epoch, -1) for epoch, s in enumerate(stored)], axis=0)
    assert scores_of(infobatch.folder)["last_visit"].tolist() == last_visit.tolist()


def test_only_the_newest_selections_and_checkpoints_are_kept(tmp_path: Path) -> None:
    folder = train(run_config(tmp_path, run={"keep_selections": 2, "keep_checkpoints": 1})).folder
    assert sorted(file.name for file in (folder / "selections").iterdir()) == ["epoch-000002.npz", "epoch-000003.npz"]
    assert [file.name for file in (folder / "checkpoints").glob("epoch-*")] == ["epoch-000004"]
    none = train(run_config(tmp_path, "none", run={"keep_selections": 0})).folder
    assert not (none / "selections").exists()


def test_pandas_reads_the_scores(infobatch: RunResult) -> None:
    scores = pd.read_parquet(infobatch.folder / "scores.parquet")
    source = open_data("digits", limit=NUM_SAMPLES).train
    assert list(scores.columns) == ["id", "label", "loss", "last_visit", "times_pruned"]
    assert scores["id"].tolist() == list(range(NUM_SAMPLES))
    assert scores["label"].tolist() == source.labels.tolist()
    assert scores["id"].dtype == np.int64
    assert np.isfinite(scores["loss"]).all()
    about = json.loads(pq.read_schema(infobatch.folder / "scores.parquet").metadata[b"rayprune"])
    assert about["fingerprint"] == source.fingerprint
    assert about["method"]["name"] == "infobatch"


def test_config_yaml_reads_back_equal(infobatch: RunResult) -> None:
    stored = Config.model_validate(yaml.safe_load((infobatch.folder / "config.yaml").read_text()))
    assert stored == run_config(infobatch.folder.parent)


def test_the_environment_has_versions_and_data(infobatch: RunResult) -> None:
    environment = json.loads((infobatch.folder / "environment.json").read_text())
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["versions"]["ray"][0].isdigit()
    assert environment["fingerprint"] == open_data("digits", limit=NUM_SAMPLES).train.fingerprint
    assert environment["seed"] == 0


COUNTS = {"samples_trained", "samples_forwarded", "samples_padded", "bytes_read", "kept", "num_samples"}
COUNTS |= {"world_size", "epoch"}
SHARES = {"requested_prune_ratio", "pruned_fraction", "train_accuracy", "val_accuracy"}
POSITIVE = {"train_loss", "val_loss", "lr", "lr_scale", "mean_weight", "wall_time"}
SECONDS = {"epoch", "train", "data_wait", "select", "record", "forward_only", "validate", "checkpoint"}


def test_metrics_have_every_key_and_valid_values(infobatch: RunResult) -> None:
    lines = [json.loads(line) for line in (infobatch.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == infobatch.metrics
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    for line in lines:
        assert set(line) >= COUNTS | SHARES | POSITIVE | {"plan_hash", "seconds"}
        assert all(isinstance(line[key], int) and line[key] >= 0 for key in COUNTS)
        assert all(0 <= line[key] <= 1 for key in SHARES)
        assert all(line[key] > 0 and math.isfinite(line[key]) for key in POSITIVE)
        assert len(line["plan_hash"]) == 32
        seconds = line["seconds"]
        assert set(seconds) == SECONDS
        parts = [seconds[name] for name in ("train", "forward_only", "validate", "checkpoint")]
        assert 0 < sum(parts) <= seconds["epoch"]
        assert seconds["data_wait"] <= seconds["train"] + seconds["validate"]
    assert lines[0]["num_samples"] == NUM_SAMPLES
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    walls = [line["wall_time"] for line in lines]
    assert walls == sorted(walls)


def test_validation_runs_at_its_interval_and_at_the_end(tmp_path: Path) -> None:
    result = train(run_config(tmp_path, train={"validate_every": 3}))
    for key in ("val_accuracy", "val_class_accuracy"):
        assert [line[key] is not None for line in result.metrics] == [False, False, True, True]
    assert results(result.metrics, set(RESULT_KEYS) - {"val_accuracy"}) == results(
        train(run_config(tmp_path, "always")).metrics, set(RESULT_KEYS) - {"val_accuracy"}
    ), "validation has an influence on training"


def test_val_accuracy_is_that_of_the_saved_network(infobatch: RunResult) -> None:
    validation = open_data("digits").validation
    logits, targets = outputs(run_config(infobatch.folder.parent), validation, weights_of(infobatch.folder))
    correct = (logits.argmax(1) == targets).double()
    assert read_validation(infobatch.folder, 360).tolist() == correct.bool().tolist()
    assert infobatch.metrics[-1]["val_accuracy"] == pytest.approx(correct.mean().item(), abs=1e-9)
    classes = [correct[targets == label].mean().item() for label in range(10)]
    assert len(set(classes)) > 1
    assert infobatch.metrics[-1]["val_class_accuracy"] == pytest.approx(classes, abs=1e-6)


def test_each_epoch_has_score_quantiles(tmp_path: Path) -> None:
    result = train(run_config(tmp_path))
    for line in result.metrics:
        loss = line["score_quantiles"]["loss"]
        assert len(loss) == 7
        assert loss == sorted(loss)
    scores = scores_of(result.folder)["loss"]
    assert loss == pytest.approx(np.quantile(scores, QUANTILES), abs=1e-5)


def test_a_run_trains_on_the_labels_that_an_audit_suggests(tmp_path: Path, infobatch: RunResult) -> None:
    source = open_data("digits", limit=NUM_SAMPLES).train
    p_wrong = np.where(np.arange(NUM_SAMPLES) % 3 == 0, 0.9, 0.1)
    suggested = (source.labels + 1) % 10
    audit = write_audit(tmp_path, AuditTable(source.labels, p_wrong, suggested_label=suggested), source.fingerprint)
    notices: list[str] = []
    local = train(run_config(tmp_path, data={"relabel": str(audit)}), on_notice=notices.append)
    assert f"data.relabel replaces the labels of 101 of {NUM_SAMPLES} training samples" in notices
    assert scores_of(local.folder)["label"].tolist() == np.where(p_wrong > 0.5, suggested, source.labels).tolist()
    assert results(local.metrics) != results(infobatch.metrics)
    for name, data, scaling in (("device", {}, {"stream": "device"}), ("cache", {"cache": "disk"}, {})):
        other = run_config(tmp_path, name, data={"relabel": str(audit), **data}, scaling=scaling)
        assert_same_run(local, train(other))
    with pytest.raises(RunFolderError, match="data"):
        train(run_config(tmp_path))  # the same folder, the labels as given
    with pytest.raises(RunFolderError, match="of other data"):
        train(run_config(tmp_path, "limited", data={"relabel": str(audit), "limit": 300}))
