"""Read what an L2wStep computes on the way."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rayprune.nn.steps import L2wStep


class L2wTrace:
    """Record the intermediate values of every half of a batch.

    Attributes:
        halves: of every half, name → value: those that the step traces, the weight network's gradients as `meta_grad`
            if it learned, and the parameters after the half as `params_after` and `meta_after`.
    """

    def __init__(self, step: L2wStep) -> None:
        self.halves: list[dict[str, Any]] = []
        self._step, self._values = step, dict[str, Any]()
        step._trace = self  # type: ignore[method-assign,assignment]

    def __call__(self, **values: Any) -> None:
        """Add the values; those of the training loss end a half."""
        self._values |= values
        if "pseudo_loss" in values:
            named = self._step.weight_net.named_parameters()
            self._values["meta_grad"] = {name: parameter.grad.clone() for name, parameter in named}
        if "loss" in values:
            after = {"params_after": _copied(self._step.model), "meta_after": _copied(self._step.weight_net)}
            self.halves.append({**self._values, **after})
            self._values = {}


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
