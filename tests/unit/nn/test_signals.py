"""Per-sample losses, and signals of targets of any task: classes, dense targets, several labels.

Their definitions are tested in tests/numerics/test_signals.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rayprune.errors import ConfigError
from rayprune.nn.boundary import pair_distances
from rayprune.nn.signals import (
    BOUNDARY_SIGNALS,
    SIGNALS,
    compute_signals,
    losses_per_sample,
    max_probability,
    per_sample_loss,
    signals_per_sample,
    weighted_mean,
)

GENERATOR = np.random.default_rng(3)


def logits(*shape: int) -> torch.Tensor:
    return torch.from_numpy(GENERATOR.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 7), (4, 1, 1, 1), (4, 3, 5)])
def test_losses_of_any_shape_reduce_to_means_over_all_but_the_first_axis(shape: tuple[int, ...]) -> None:
    losses = logits(*shape).abs()
    axes = tuple(range(1, len(shape)))
    assert torch.allclose(losses_per_sample(losses, 4, token_axis=axes), torch.stack([one.mean() for one in losses]))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_one_number_per_sample_needs_no_declared_axes(shape: tuple[int, ...]) -> None:
    losses = logits(*shape)
    assert torch.equal(losses_per_sample(losses, 4), losses.flatten())


def test_numbers_that_could_be_logits_are_refused_unless_their_axes_are_declared() -> None:
    with pytest.raises(ConfigError, match=r"\(4, 10\) numbers for 4 samples, which could be logits"):
        losses_per_sample(logits(4, 10), 4)
    assert losses_per_sample(logits(4, 10), 4, token_axis=-1).shape == (4,)
    assert losses_per_sample(logits(4, 10), 4, torch.ones(4, 10)).shape == (4,)
    with pytest.raises(ConfigError, match="token_axis 1 does not name the axes"):
        losses_per_sample(logits(4, 3, 3), 4, token_axis=1)


def test_a_mask_leaves_positions_out_and_an_empty_mask_gives_zero() -> None:
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    reduced = losses_per_sample(losses, 3, mask)
    assert reduced.tolist() == [1.5, 4.0, 0.0]
    reduced.sum().backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_mask_can_weigh_positions() -> None:
    assert losses_per_sample(torch.tensor([[1.0, 3.0]]), 1, torch.tensor([[0.1, 0.3]])).tolist() == pytest.approx([2.5])


@pytest.mark.parametrize(
    ("losses", "mask", "words"),
    [
        (torch.tensor(1.0), None, r"one loss per sample and got a scalar.*reduction='none'"),
        (np.ones(4, np.float32), None, r"a tensor \(B,\) and got ndarray"),
        (1.0, None, r"a tensor \(B,\) and got float: .*without \.item\(\)"),
        (torch.zeros(3), None, r"shape \(3,\) for a batch of 4"),
        (torch.zeros(4, 2), torch.ones(4), "must have the same shape"),
    ],
)
def test_losses_of_a_wrong_shape_are_refused(losses: torch.Tensor, mask: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        losses_per_sample(losses, 4, mask)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=9), st.integers(1, 16))
@settings(max_examples=50, deadline=None)
def test_the_divisor_is_the_number_of_rows_whatever_the_weights(weights: list[float], rows: int) -> None:
    losses = torch.arange(1.0, len(weights) + 1)
    expected = sum(weight * loss for weight, loss in zip(weights, losses.tolist(), strict=True)) / rows
    assert weighted_mean(losses, torch.tensor(weights), rows).item() == pytest.approx(expected)


def test_a_nan_loss_of_padding_stays_out_of_the_mean() -> None:
    losses = torch.tensor([1.0, float("nan")])
    assert weighted_mean(losses, torch.tensor([2.0, 0.0]), 2).item() == 1.0


def test_class_targets_give_the_signals_of_the_train_steps() -> None:
    scores, targets = logits(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    losses = functional.cross_entropy(scores, targets, reduction="none")
    head, embeddings = torch.nn.Linear(3, 5), logits(6, 3)
    distances = pair_distances(head.weight)
    expected = compute_signals(SIGNALS, scores, targets, losses, distances_CC=distances, embeddings_BD=embeddings)
    for layer in (head, head.weight):
        signals = signals_per_sample(SIGNALS, losses, logits=scores, targets=targets, head=layer, embeddings=embeddings)
        assert all(torch.equal(signals[name], expected[name]) for name in SIGNALS)


def test_another_head_gives_other_distances() -> None:
    scores, targets, heads = logits(6, 5), torch.zeros(6, dtype=torch.int64), [torch.nn.Linear(3, 5) for _ in range(2)]
    for head in (*heads, *heads):
        signals = signals_per_sample(("boundary",), torch.zeros(6), logits=scores, targets=targets, head=head)
        distances = pair_distances(head.weight)
        expected = compute_signals(("boundary",), scores, targets, torch.zeros(6), distances_CC=distances)
        assert torch.equal(signals["boundary"], expected["boundary"])


@pytest.mark.parametrize("name", BOUNDARY_SIGNALS)
def test_boundary_signals_need_the_last_layer_and_one_class_per_sample(name: str) -> None:
    scores, targets, head = logits(6, 5), torch.zeros(6, dtype=torch.int64), torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match=rf"needs {name}: give weigh\(head=model.fc\)"):
        signals_per_sample((name,), torch.zeros(6), logits=scores, targets=targets)
    dense = {"logits": logits(6, 5, 4), "targets": torch.zeros(6, 4, dtype=torch.int64)}
    several_labels = {"logits": scores, "targets": torch.zeros(6, 5)}
    for outputs in (dense, several_labels):
        with pytest.raises(ValueError, match=f"{name} need one class per sample"):
            signals_per_sample((name,), torch.zeros(6), **outputs, head=head)


def test_signals_of_dense_targets_are_means_over_the_positions() -> None:
    scores, targets = logits(2, 3, 4, 5), torch.from_numpy(GENERATOR.integers(0, 3, (2, 4, 5)))
    losses = losses_per_sample(functional.cross_entropy(scores, targets, reduction="none"), 2, token_axis=(1, 2))
    names = ("correct", "entropy", "el2n", "margin", "logit_margin", "prob_label", "probs")
    signals = signals_per_sample(names, losses, logits=scores, targets=targets)
    for row in range(2):
        flat = scores[row].flatten(1).T
        expected = compute_signals(names, flat, targets[row].flatten(), torch.zeros(20))
        for name in names:
            assert torch.allclose(signals[name][row], expected[name].mean(0), atol=1e-6), name


def test_each_of_several_labels_is_a_decision_between_two_classes() -> None:
    scores, targets = logits(3, 4), torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    names = ("correct", "prob_label", "entropy", "probs", "logit_margin")
    signals = signals_per_sample(names, torch.zeros(3), logits=scores, targets=targets)
    assert torch.allclose(signals["logit_margin"], torch.where(targets > 0, scores, -scores).mean(1), atol=1e-6)
    p = scores.sigmoid()
    of_label = torch.where(targets > 0, p, 1 - p)
    assert torch.allclose(signals["prob_label"], of_label.mean(1), atol=1e-6)
    assert torch.equal(signals["correct"], (of_label > 0.5).float().mean(1))
    assert torch.allclose(signals["entropy"], -(p * p.log() + (1 - p) * (1 - p).log()).mean(1), atol=1e-5)
    assert torch.allclose(signals["probs"], p)


@pytest.mark.parametrize(
    ("names", "arguments", "words"),
    [
        (("el2n",), {}, r"needs el2n: give weigh\(logits=\)"),
        (("el2n",), {"logits": logits(3, 2)}, "needs the targets: give"),
        (("el2n",), {"logits": logits(3, 2), "targets": torch.zeros(2, dtype=torch.int64)}, "do not fit logits"),
        (("el2n",), {"logits": logits(3, 2), "targets": torch.zeros(3, 5)}, "several labels"),
        (("el2n",), {"logits": logits(4, 2), "targets": torch.zeros(4, dtype=torch.int64)}, r"must be \(3, classes"),
        (("embedding",), {}, r"give weigh\(embeddings=\)"),
        (("embeding",), {}, "unknown signal 'embeding'.*embedding"),
    ],
)
def test_missing_and_misshapen_arguments_are_named(
    names: tuple[str, ...], arguments: dict[str, torch.Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        signals_per_sample(names, torch.zeros(3), **arguments)


def test_embeddings_pass_through() -> None:
    values = logits(3, 7).requires_grad_()
    signals = signals_per_sample(("embedding", "loss"), torch.ones(3), embeddings=values)
    assert torch.equal(signals["embedding"], values)
    assert not signals["embedding"].requires_grad


def test_half_precision_losses_do_not_overflow() -> None:
    assert weighted_mean(torch.full((8192,), 20.0, dtype=torch.float16), torch.ones(8192), 8192).item() == 20.0


def test_a_nan_at_a_masked_position_stays_out_of_the_mean() -> None:
    losses = torch.tensor([[1.0, float("nan")]])
    assert losses_per_sample(losses, 1, torch.tensor([[1, 0]])).tolist() == [1.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_mean_of_the_losses_is_torchs_cross_entropy(smoothing: float) -> None:
    logits_BC, targets_B = torch.randn(9, 5), torch.arange(9) % 5
    losses_B = per_sample_loss(logits_BC, targets_B, label_smoothing=smoothing)
    assert losses_B.shape == (9,)
    expected = functional.cross_entropy(logits_BC, targets_B, label_smoothing=smoothing)
    torch.testing.assert_close(losses_B.mean(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits_BC = (torch.randn(6, 4) * 5).to(dtype)
    targets_B = torch.arange(6) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses_B = per_sample_loss(logits_BC, targets_B)
    assert losses_B.dtype == torch.float32
    for row, target, loss in zip(logits_BC.tolist(), targets_B.tolist(), losses_B.tolist(), strict=True):
        assert loss == pytest.approx(math.log(sum(math.exp(z) for z in row)) - row[target], rel=1e-5, abs=1e-6)


def test_the_largest_probability_of_half_precision_logits_is_computed_in_float32() -> None:
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16)
    assert max_probability(logits).dtype == torch.float32
    assert max_probability(logits).item() == pytest.approx(0.999877, abs=1e-6)
