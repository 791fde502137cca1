"""The weight network of L2W-DEN (Han et al., ECCV 2022, arXiv 2209.08310): a sample's losses in, a number an exit out.

Shapes: B batch, I inputs, K exits.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

Input = Literal["loss", "conf", "both"]


class WeightNet(nn.Module):
    """An MLP with ReLU and a tanh at its end.

    Args:
        num_exits: K.
        inputs: what it sees: the K losses, the K confidences, or both, losses first.
        hidden: width of its hidden layers.
        layers: their number.
        seed: of its initial weights; the global generator is left as it is.
    """

    def __init__(
        self, num_exits: int, *, inputs: Input = "loss", hidden: int = 500, layers: int = 1, seed: int = 0
    ) -> None:
        super().__init__()
        width = 2 * num_exits if inputs == "both" else num_exits
        # Drawn on the CPU: the same weights on every rank and device.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [width, *[hidden] * layers]
            self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
            self.output = nn.Linear(sizes[-1], num_exits)

    def forward(self, observed_BI: Tensor) -> Tensor:
        """Give (B, K) in (-1, 1)."""
        state = observed_BI
        for layer in self.hidden:
            state = torch.relu(layer(state))
        return torch.tanh(self.output(state))


def observed(inputs: Input, losses_BK: Tensor, confidences_BK: Tensor) -> Tensor:
    """Return what the weight network sees of each row, detached."""
    seen: dict[str, Any] = {"loss": [losses_BK], "conf": [confidences_BK], "both": [losses_BK, confidences_BK]}
    return torch.cat(seen[inputs], dim=1).detach()
