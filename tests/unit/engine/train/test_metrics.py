"""The sums of a pass and the metrics made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rayprune.engine.data.batch import PlacedRows
from rayprune.engine.storage.costs import PriorCost
from rayprune.engine.train.metrics import BYTES, PADDED, MetricSums, compute, means, validated
from rayprune.nn.steps import STEPS

CPU = torch.device("cpu")


def add(sums: MetricSums, losses: list[float], correct: list[float], real: list[bool], num_bytes: int = 0) -> None:
    """Add a batch without labels."""
    signals = {"loss": torch.tensor(losses), "correct": torch.tensor(correct)}
    mask = torch.tensor(real)
    rows = PlacedRows(torch.arange(len(real)), torch.ones(len(real)), mask)
    sums.add(signals, rows, mask.numpy(), num_bytes)


def test_classes_are_counted_exactly_and_without_padding() -> None:
    sums = MetricSums(CPU, 3)
    signals = {"loss": torch.ones(5), "correct": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])}
    real, labels = torch.tensor([True, True, True, False, False]), torch.tensor([0, 0, 2, 0, 1])
    for _ in range(2):
        sums.add(signals, PlacedRows(labels, signals["loss"], real), real.numpy(), 0, labels)
    results = validated(sums.total(1))
    assert results["val_class_accuracy"] == [0.5, None, 1.0]
    assert results["val_accuracy"] == pytest.approx(2 / 3)
    assert validated(None) == dict.fromkeys(results)


def test_padding_and_nonfinite_losses_do_not_enter_the_mean() -> None:
    sums = MetricSums(CPU)
    add(sums, [1.0, 3.0, math.nan, 100.0], [1.0, 0.0, 0.0, 1.0], [True, True, True, False], num_bytes=7)
    add(sums, [2.0], [1.0], [True], num_bytes=5)
    total = sums.total(1)
    assert means(total) == (pytest.approx(2.0), pytest.approx(2 / 4))
    assert (total[PADDED], total[BYTES]) == (1, 12)


def test_the_mean_loss_is_nan_without_a_finite_one() -> None:
    sums = MetricSums(CPU)
    add(sums, [math.inf, math.nan], [0.0, 1.0], [True, True])
    loss, accuracy = means(sums.total(1))
    assert math.isnan(loss)
    assert accuracy == 0.5


def test_sums_continue_from_a_checkpoint() -> None:
    losses = np.random.default_rng(0).exponential(size=(6, 4)).tolist()
    whole, first = MetricSums(CPU), MetricSums(CPU)
    for batch in losses:
        add(whole, batch, [1.0, 0.0, 1.0, 0.0], [True, True, True, False], num_bytes=2**40)
    for batch in losses[:2]:
        add(first, batch, [1.0, 0.0, 1.0, 0.0], [True, True, True, False], num_bytes=2**40)
    resumed = MetricSums(CPU, stored=first.total(1).tolist())
    for batch in losses[2:]:
        add(resumed, batch, [1.0, 0.0, 1.0, 0.0], [True, True, True, False], num_bytes=2**40)
    assert torch.equal(resumed.total(1), whole.total(1))


def test_compute_counts_a_forward_pass_as_a_third_and_adds_the_scoring_run() -> None:
    network = torch.nn.Linear(2, 2)
    step = STEPS["plain"](network, torch.optim.SGD(network.parameters(), lr=0.1), signals=("loss",))
    counts = {**PriorCost().counts, "samples_trained": 90, "samples_padded": 6, "samples_forwarded": 30}
    assert compute(counts, PriorCost(), step, "model") == 90 + 6 + 30 / 3
    # The counts of a run include those of its scoring run, whose compute may be that of another network.
    prior = PriorCost(samples_trained=50, compute=20.0)
    assert compute({**counts, "samples_trained": 140}, prior, step, "model") == 20 + 90 + 6 + 30 / 3
