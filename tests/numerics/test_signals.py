"""Signals against naive per-sample Python and against arrays computed by DeepCore's own program.

Shapes: B batch, C classes, D features.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rayprune.nn.signals import BOUNDARY_SIGNALS, SIGNALS, check_signals, compute_signals, per_sample_loss
from tests.support.paths import GOLDEN

# The boundary signals are tested in test_boundary.py.
OTHERS = [name for name in SIGNALS if name not in BOUNDARY_SIGNALS]
STORED_SIGNALS = GOLDEN / "deepcore_scores.npz"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def naive_signals(logits: list[float], target: int, embedding: list[float]) -> dict[str, float | list[float]]:
    """Transcribe the definitions for one sample, in Python floats."""
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    probs = [power / sum(powers) for power in powers]
    first, second = sorted(probs)[:-3:-1]
    errors = [p - (c == target) for c, p in enumerate(probs)]
    # The gradient of the last layer: the outer product of the errors with the features and the 1 of the bias.
    gradient = [error * feature for error in errors for feature in (*embedding, 1.0)]
    return {
        "correct": float(logits.index(top) == target),
        "confidence": max(probs),
        "prob_label": probs[target],
        "entropy": -sum(p * math.log(p) for p in probs if p > 0.0),
        "el2n": math.sqrt(sum((p - (c == target)) ** 2 for c, p in enumerate(probs))),
        "margin": probs[target] - max(p for c, p in enumerate(probs) if c != target),
        "logit_margin": logits[target] - max(z for c, z in enumerate(logits) if c != target),
        "top_gap": first - second,
        "probs": probs,
        "logit_gradient": errors,
        "embedding": embedding,
        "grand": math.sqrt(sum(number**2 for number in gradient)),
    }


def make_logits(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if case == "saturated":
        return torch.where(torch.rand(40, 6, generator=generator) < 0.3, 200.0, -200.0)
    if case == "two_classes":
        return torch.randn(40, 2, generator=generator) * 3
    logits_BC = torch.randn(40, 10, generator=generator) * 4
    return logits_BC.to(getattr(torch, case)) if case != "plain" else logits_BC


@pytest.mark.parametrize("case", ["plain", "saturated", "two_classes", "float16", "bfloat16", "float64"])
def test_every_signal_equals_its_naive_definition(case: str) -> None:
    logits_BC = make_logits(case).requires_grad_()
    targets_B = torch.arange(len(logits_BC)) % logits_BC.shape[1]
    losses_B = per_sample_loss(logits_BC, targets_B)
    embeddings_BD = torch.randn(len(logits_BC), 3, generator=torch.Generator().manual_seed(8)).to(logits_BC.dtype)
    signals = compute_signals(OTHERS, logits_BC, targets_B, losses_B, embeddings_BD=embeddings_BD)
    rows = zip(logits_BC.tolist(), targets_B.tolist(), embeddings_BD.tolist(), strict=True)
    expected = [naive_signals(*row) for row in rows]
    for name, values in signals.items():
        assert values.dtype == torch.float32
        assert not values.requires_grad
        if name == "loss":
            torch.testing.assert_close(values, losses_B.detach().float())
            continue
        naive = torch.tensor([sample[name] for sample in expected], dtype=torch.float64)
        assert values.shape == naive.shape
        torch.testing.assert_close(values.double(), naive, rtol=2e-6, atol=1e-6, msg=f"{name} in {case}")


def test_signals_equal_deepcores_arrays() -> None:
    golden = np.load(STORED_SIGNALS, allow_pickle=False)
    logits_BC, targets_B = torch.from_numpy(golden["logits"]), torch.from_numpy(golden["targets"])
    names = ["el2n", "entropy", "top_gap", "grand", "margin", "confidence"]
    embeddings_BD = torch.from_numpy(golden["embeddings"])
    signals = compute_signals(names, logits_BC, targets_B, torch.zeros(64), embeddings_BD=embeddings_BD)
    np.testing.assert_allclose(signals["el2n"], golden["el2n"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(signals["grand"], golden["grand_lastlayer"], rtol=1e-5, atol=1e-6)
    # DeepCore adds 1e-6 inside the logarithm: at most about C·1e-6.
    np.testing.assert_allclose(signals["entropy"], -golden["neg_entropy"], rtol=0, atol=1.2e-5)
    # Its margin does not look at the label.
    np.testing.assert_allclose(signals["top_gap"], golden["margin"], rtol=0, atol=1e-6)
    assert np.abs(signals["margin"].numpy() - golden["margin"]).max() > 0.5
    # Without the bias, its GraNd would be another number.
    without_bias_B = signals["el2n"] * embeddings_BD.norm(dim=1)
    assert np.abs(without_bias_B.numpy() - golden["grand_lastlayer"]).max() > 0.1


def test_least_confidence_is_not_deepcores_largest_logit() -> None:
    golden = np.load(STORED_SIGNALS, allow_pickle=False)
    logits_BC, targets_B = torch.from_numpy(golden["logits"]), torch.from_numpy(golden["targets"])
    confidence_B = compute_signals(["confidence"], logits_BC, targets_B, torch.zeros(64))["confidence"].numpy()
    largest_B = golden["least_confidence_maxlogit"]
    assert np.allclose(largest_B, golden["logits"].max(axis=1))
    assert np.abs(confidence_B - largest_B).max() > 1.0
    # Other samples are the least confident, so that the subsets differ too.
    assert set(np.argsort(confidence_B)[:10]) != set(np.argsort(largest_B)[:10])


def test_the_margin_is_not_the_gap_of_the_two_best_classes() -> None:
    logits_BC = torch.tensor([[3.0, 1.0, 0.0]])
    value = compute_signals(["margin"], logits_BC, torch.tensor([2]), torch.zeros(1))["margin"].item()
    probs = naive_signals([3.0, 1.0, 0.0], 2, [])["probs"]
    assert isinstance(probs, list)
    assert value == pytest.approx(probs[2] - probs[0])
    assert value < 0 < probs[0] - probs[1]


def test_a_diverged_row_is_not_correct() -> None:
    logits_BC = torch.tensor(
        [[math.nan, math.nan], [2.0, 1.0], [math.inf, 1.0], [-math.inf, -math.inf], [1.0, math.nan]]
    )
    signals = compute_signals(["correct", "entropy"], logits_BC, torch.tensor([0, 0, 0, 0, 1]), torch.zeros(5))
    assert signals["correct"].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert signals["entropy"].isnan().tolist() == [True, False, True, True, True]


def test_a_class_with_logit_minus_infinity_has_no_probability() -> None:
    logits_BC = torch.tensor([[0.0, 0.0, -math.inf]])
    signals = compute_signals(["entropy", "margin", "logit_margin"], logits_BC, torch.tensor([0]), torch.zeros(1))
    assert signals["entropy"].item() == pytest.approx(math.log(2))
    assert signals["logit_margin"].item() == 0.0
    assert signals["margin"].item() == pytest.approx(0.0)


def test_an_unknown_signal_is_refused_with_the_closest_name() -> None:
    check_signals(SIGNALS)
    with pytest.raises(ValueError, match=r"unknown signal 'el2m': did you mean 'el2n'\?"):
        compute_signals(["loss", "el2m"], torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match="unknown signal 'features'"):
        check_signals(["features"])
