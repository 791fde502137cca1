"""The step that trains a network together with its parameter-sharing proxy (DynaMS, Wang et al., ICLR 2023).

The recipe is that of slimmable networks (Yu et al., ICLR 2019, arXiv 1812.08928), without their distillation: the same
batch goes through the whole network and then through the slice, the gradients of both losses add up, and the optimiser
steps once. The paper's own code is not public.

Shapes: B rows of this worker's share of the batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.nn.boundary import PairDistances
from rayprune.nn.proxy import Proxy, mac_ratio
from rayprune.nn.steps.plain import PlainStep


class WithProxy(nn.Module):
    """A network and its proxy as one module, so that DDP reduces the gradients of both and shares their buffers.

    Args:
        network: as `Proxy` takes it.
        width: of the proxy, in (0, 1].
        input_shape: of one sample.

    Attributes:
        mac_ratio: multiply-adds of the proxy relative to the network's, φ.
    """

    def __init__(self, network: nn.Module, width: float, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.proxy = Proxy(network, width, input_shape)
        self.mac_ratio = mac_ratio(network, self.proxy, input_shape)

    def forward(self, inputs: Tensor, part: str = "model") -> Tensor:
        """Give the logits (B, C) of a part: "model" or "proxy"."""
        logits: Tensor = self.proxy(inputs) if part == "proxy" else self.network(inputs)
        return logits


class PspStep(PlainStep):
    """Take one optimisation step on a weighted batch for a network and its proxy.

    Signals are those of the whole network; the proxy's are had by `evaluate(part="proxy")`.

    Args:
        model: what `module_of` returned, DDP-wrapped or not.
        optimizer: over its parameters, which are the network's.
        width: as `module_of` took it.
        weight: of the proxy's loss, above 0.
        **recipe: as PlainStep takes it.

    Raises:
        ValueError: a value outside its range.
    """

    parts = ("model", "proxy")

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        width: float = 0.25,
        weight: float = 1.0,
        **recipe: Any,
    ) -> None:
        super().__init__(model, optimizer, **recipe)
        if not (weight > 0.0 and math.isfinite(weight)):
            raise ValueError(f"the proxy's weight must be above 0, got {weight}")
        assert isinstance(self._module, WithProxy), "the model must be what module_of returned"
        self._weight, self._pair, self._network = weight, self._module, self._module.network
        self._tables["proxy"] = PairDistances(self._pair.proxy.head_features)
        self.train_cost = 1.0 + self._pair.mac_ratio

    @staticmethod
    def module_of(  # type: ignore[override]
        network: nn.Module, input_shape: tuple[int, ...], *, width: float = 0.25, weight: float = 1.0
    ) -> nn.Module:
        """Return the network with its proxy.

        Raises:
            ValueError: the width leaves a layer without channels, or the network can't be sliced.
        """
        return WithProxy(network, width, input_shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the proxy's running statistics."""
        return {"proxy": dict(self._pair.proxy.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the proxy's running statistics.

        Raises:
            ValueError: the state is of another train step.
        """
        if set(state) != {"proxy"}:
            raise ValueError(f"the state of another train step (it holds {', '.join(sorted(state)[:3])}): not taken")
        self._pair.proxy.load_state_dict(state["proxy"])

    def buffers(self) -> Iterator[Tensor]:
        """Yield the proxy's running statistics."""
        return self._pair.proxy.buffers()

    def relative_cost(self, part: str = "model") -> float:
        """Return the multiply-adds of a forward through a part, relative to the model's: φ for the proxy.

        Raises:
            ValueError: an unknown part.
        """
        return self._pair.mac_ratio if self._known(part) == "proxy" else 1.0

    def _evaluated(self, inputs: Tensor, part: str) -> Tensor:
        logits: Tensor = self._pair(inputs, part=part)
        return logits

    def _backward(
        self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor, rows: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        # DDP reduces what has added up when the last backward of all is through.
        seen = self._pass(inputs, targets_B, weights_B, rows, synchronise=False)
        self._pass(inputs, targets_B, weights_B, rows, synchronise=last, factor=self._weight, part="proxy")
        return seen
