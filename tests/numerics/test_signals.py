"""Signals against naive per-sample Python and against arrays computed by DeepCore's own program.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rayprune.nn.signals import (
    BOUNDARY_SIGNALS,
    EMBEDDING_SIGNALS,
    SIGNALS,
    check_signals,
    compute_signals,
    per_sample_loss,
)
from tests.support.paths import GOLDEN

# The boundary signals are tested in test_boundary.py, those of embeddings with the scoring runs.
OF_LOGITS = [name for name in SIGNALS if name not in (*BOUNDARY_SIGNALS, *EMBEDDING_SIGNALS)]
STORED_SIGNALS = GOLDEN / "deepcore_signals.npz"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def naive_signals(logits: list[float], target: int) -> dict[str, float | list[float]]:
    """Transcribe the definitions for one sample, in Python floats."""
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    probs = [power / sum(powers) for power in powers]
    return {
        "correct": float(logits.index(top) == target),
        "confidence": max(probs),
        "prob_label": probs[target],
        "entropy": -sum(p * math.log(p) for p in probs if p > 0.0),
        "el2n": math.sqrt(sum((p - (c == target)) ** 2 for c, p in enumerate(probs))),
        "margin": probs[target] - max(p for c, p in enumerate(probs) if c != target),
        "probs": probs,
        "logit_gradient": [p - (c == target) for c, p in enumerate(probs)],
        "top_gap": sorted(probs)[-1] - sorted(probs)[-2],
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
    signals = compute_signals(OF_LOGITS, logits_BC, targets_B, losses_B)
    expected = [naive_signals(row, target) for row, target in zip(logits_BC.tolist(), targets_B.tolist(), strict=True)]
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
    losses_B = torch.zeros(len(targets_B))
    signals = compute_signals(["el2n", "entropy"], logits_BC, targets_B, losses_B)
    np.testing.assert_allclose(signals["el2n"], golden["el2n"], rtol=1e-5, atol=1e-6)
    # DeepCore adds 1e-6 inside the logarithm: at most about C·1e-6.
    np.testing.assert_allclose(signals["entropy"], -golden["neg_entropy"], rtol=0, atol=1.2e-5)
    # Its margin is the gap of the two best classes: ours, with the best class as the label.
    best = compute_signals(["margin"], logits_BC, logits_BC.argmax(dim=1), losses_B)["margin"]
    np.testing.assert_allclose(best, golden["margin"], rtol=0, atol=1e-6)


def test_the_margin_is_not_the_gap_of_the_two_best_classes() -> None:
    logits_BC = torch.tensor([[3.0, 1.0, 0.0]])
    value = compute_signals(["margin"], logits_BC, torch.tensor([2]), torch.zeros(1))["margin"].item()
    probs = naive_signals([3.0, 1.0, 0.0], 2)["probs"]
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
    signals = compute_signals(["entropy", "margin"], logits_BC, torch.tensor([0]), torch.zeros(1))
    assert signals["entropy"].item() == pytest.approx(math.log(2))
    assert signals["margin"].item() == pytest.approx(0.0)


def test_an_unknown_signal_is_refused_with_the_closest_name() -> None:
    check_signals(SIGNALS)
    with pytest.raises(ValueError, match=r"unknown signal 'el2m': did you mean 'el2n'\?"):
        compute_signals(["loss", "el2m"], torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match="unknown signal 'embedings': did you mean 'embedding'"):
        check_signals(["embedings"])
