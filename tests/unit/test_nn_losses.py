"""Per-sample losses keep float32 and torch's definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from rayprune.nn.signals import per_sample_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_mean_equals_torch_mean(smoothing: float) -> None:
    logits_BC, targets_B = torch.randn(9, 5), torch.arange(9) % 5
    losses_B = per_sample_loss(logits_BC, targets_B, label_smoothing=smoothing)
    assert losses_B.shape == (9,)
    expected = functional.cross_entropy(logits_BC, targets_B, label_smoothing=smoothing)
    torch.testing.assert_close(losses_B.mean(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_lose_nothing_more(dtype: torch.dtype) -> None:
    logits_BC = (torch.randn(6, 4) * 5).to(dtype)
    targets_B = torch.arange(6) % 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses_B = per_sample_loss(logits_BC, targets_B)
    assert losses_B.dtype == torch.float32
    for row, target, loss in zip(logits_BC.tolist(), targets_B.tolist(), losses_B.tolist(), strict=True):
        assert loss == pytest.approx(math.log(sum(math.exp(z) for z in row)) - row[target], rel=1e-5, abs=1e-6)


def test_smoothing_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\], got 1.5"):
        per_sample_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), label_smoothing=1.5)
