"""The plain step of networks with several exits: its loss, the signals for methods, the metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.config import make_config
from rayprune.engine.data.batch import PlacedRows
from rayprune.engine.train.driver import train
from rayprune.engine.train.metrics import MetricSums, validated
from rayprune.nn.steps import ExitStep
from tests.support.multi_exit_models import tower
from tests.support.paths import MULTI_EXIT_MODELS
from tests.support.runs import run_config, user

SHAPE = (5,)


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tower(num_classes=4, input_shape=SHAPE, **options)


def batch(rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 0.0])[:rows]
    return torch.randn(rows, *SHAPE, generator=generator), torch.randint(4, (rows,), generator=generator), weights


def exits(model: nn.Module, **options: Any) -> ExitStep:
    return ExitStep(model, torch.optim.SGD(model.parameters(), lr=0.1), num_exits=3, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_the_sum_over_exits_of_weighted_means(accumulate: int) -> None:
    model, reference = network(norm=False), network(norm=False)
    inputs, targets, weights = batch()
    signals = exits(model, label_smoothing=0.1, accumulate=accumulate)(inputs, targets, weights)
    each = [
        functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1) for logits in reference(inputs)
    ]
    sum((losses * weights).sum() / 6 for losses in each).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(signals["loss"], each[-1].detach())
    torch.testing.assert_close(signals["exit_loss"], torch.stack(each, dim=1).detach())


def test_methods_get_the_signals_that_score_names() -> None:
    inputs, targets, _ = batch()
    logits = network().eval()(inputs)
    losses = torch.stack([functional.cross_entropy(each, targets, reduction="none") for each in logits])
    confidences = torch.stack([each.softmax(1).amax(1) for each in logits])
    for score, loss, confidence in [
        (1, losses[0], confidences[0]),
        ("last", losses[2], confidences[2]),
        ("mean", losses.mean(0), confidences.mean(0)),
    ]:
        signals = exits(network(), score=score).evaluate(inputs, targets, smoothed=True, signals=("confidence",))
        torch.testing.assert_close(signals["loss"], loss.detach())
        torch.testing.assert_close(signals["confidence"], confidence.detach())
        torch.testing.assert_close(signals["metric_loss"], losses[2].detach())
    threshold = float(confidences.detach().median())
    depth = exits(network(), score="depth", confident=threshold).evaluate(inputs, targets, smoothed=True)
    expected = [next((k + 1 for k in range(3) if confidences[k, b] >= threshold), 4) for b in range(6)]
    assert depth["loss"].tolist() == expected
    torch.testing.assert_close(depth["metric_loss"], losses[2].detach())


def test_a_diverged_sample_has_no_depth() -> None:
    inputs, targets, _ = batch()
    inputs[0] = float("nan")
    depth = exits(network(), score="depth").evaluate(inputs, targets, smoothed=True)["loss"]
    assert depth.isnan().tolist() == [True] + [False] * 5


def test_metrics_of_every_exit_leave_padding_out() -> None:
    inputs, targets, _ = batch()
    signals = exits(network(), score="depth").evaluate(inputs, targets, smoothed=False)
    sums, real = MetricSums(torch.device("cpu"), 4, 3), torch.tensor([True] * 4 + [False] * 2)
    sums.add(signals, PlacedRows(targets, torch.ones(6), real), real.numpy(), 0, targets)
    metrics = validated(sums.total(1), 3)
    assert metrics["val_exit_loss"] == pytest.approx(signals["exit_loss"][:4].mean(0).tolist())
    assert metrics["val_exit_accuracy"] == pytest.approx(signals["exit_correct"][:4].mean(0).tolist())
    assert metrics["val_loss"] == pytest.approx(metrics["val_exit_loss"][-1])
    assert metrics["val_accuracy"] == metrics["val_exit_accuracy"][-1]
    assert len(metrics["val_class_accuracy"]) == 4


@pytest.mark.parametrize("step", ["plain", {"name": "exits", "score": "depth", "confident": 0.5}])
def test_a_run_reports_every_exit(tmp_path: Path, step: Any) -> None:
    config = run_config(
        tmp_path,
        model={"name": f"{MULTI_EXIT_MODELS}:tower", "tuples": step == "plain"},
        train={"step": step, "epochs": 3, "validate_every": 2, "record": ["confidence"]},
    )
    result = train(config)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["val_exit_accuracy"] is None
    assert lines[1]["val_exit_accuracy"][-1] == lines[1]["val_accuracy"]
    assert lines[1]["val_exit_loss"][-1] == pytest.approx(lines[1]["val_loss"])
    assert len(lines[2]["val_exit_loss"]) == 3
    assert lines[0]["train_loss"] > lines[2]["train_loss"]
    assert lines[2]["val_accuracy"] > 0.2


REFUSED = {
    "one exit in a list": ({"model": {"name": f"{MULTI_EXIT_MODELS}:one_in_a_list"}}, "it returns a list of 1"),
    "different classes": (
        {"model": {"name": f"{MULTI_EXIT_MODELS}:of_different_classes"}},
        r"\(2, 11\), \(2, 10\), \(2, 10\)",
    ),
    "one tensor": ({"train": {"step": "exits"}}, "train.step exits is for a network with several exits"),
    "no such exit": (
        {"model": {"name": f"{MULTI_EXIT_MODELS}:tower"}, "train": {"step": {"name": "exits", "score": 4}}},
        "train.step.score = 4: the model has exits 1 to 3",
    ),
    "boundaries": (
        {"model": {"name": f"{MULTI_EXIT_MODELS}:tower"}, "train": {"record": ["boundary"]}},
        "signal 'boundary' needs one last layer",
    ),
    "a proxy of several exits": (
        {"model": {"name": f"{MULTI_EXIT_MODELS}:tower"}, "method": {"name": user("TrainsBy"), "train_step": "psp"}},
        "train step 'psp' is for a network with one exit, and the model has 3",
    ),
    "a method with its own step": (
        {"method": {"name": user("TrainsBy"), "train_step": "psp"}, "train": {"step": "exits"}},
        "trains by its own step 'psp', and train.step is 'exits'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_does_not_fit_the_step_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    sections, words = REFUSED[case]
    with pytest.raises(ValueError, match=words) as caught:
        train(run_config(tmp_path, **sections))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("exit", r"unknown train.step 'exit': did you mean 'exits'\?"),
        ({"score": 1}, "train.step has no name"),
        ({"name": "exits", "scor": 1}, "did you mean 'score'"),
        ({"name": "plain", "score": 1}, "unknown key 'train.step.score' of train step 'plain'"),
        ({"name": "exits", "score": 0}, "train.step.score = 0: must be an exit from 1 on"),
        ({"name": "exits", "score": "first"}, "train.step.score = 'first': must be"),
        ({"name": "exits", "confident": 1.5}, r"train.step.confident = 1.5: must be in \(0, 1\]"),
        (3, "train.step = 3: must be text or a mapping of keys"),
    ],
)
def test_a_wrong_step_is_refused_in_one_line(step: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make_config({"train": {"step": step}})
    assert "\n" not in str(caught.value)


def test_the_default_step_does_not_change_the_digest() -> None:
    assert make_config({"train": {"step": "plain"}}).digest() == make_config({}).digest()
    assert make_config({"train": {"step": "exits"}}).digest() != make_config({}).digest()
