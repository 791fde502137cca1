"""Costs in multiply-accumulates: of a whole forward pass as torch counts them, and of every exit as published.

`exit_macs` counts by the rule of the published MSDNet program, so that its figures can be compared: a convolution
counts its products without the bias, a linear layer its weights and bias, a ReLU its elements, pooling the elements of
each window for each output. Everything else (normalization, resizing) counts nothing.

Shapes: K exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from rayprune.nn.boundary import eval_mode
from rayprune.nn.models.multi_exit import check_stepwise


def num_macs(model: Callable[[Tensor], Any], example: Tensor) -> int:
    """Count the multiply-accumulates of one forward pass, of convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which training does not need

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops()) // 2


def exit_macs(model: nn.Module, input_shape: tuple[int, ...]) -> list[int]:
    """Count the multiply-accumulates of one sample up to each exit, the earlier classifiers included.

    The model's modes and buffers do not change; on the meta device nothing is computed.

    Args:
        model: a `rayprune.nn.models.multi_exit.MultiExitModel`.
        input_shape: of one sample as the model sees it.

    Returns:
        K numbers, increasing.

    Raises:
        ConfigError: the model cannot run exit by exit.
    """
    stepwise = check_stepwise(model)
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counts.append(_layer_macs(module, inputs[0], output))

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    costs = []
    try:
        with eval_mode(model), torch.no_grad():
            state = stepwise.begin(example_input(model, input_shape, batch_size=1))
            for exit in range(stepwise.num_exits):
                _, state = stepwise.advance(exit, state)
                costs.append(sum(counts))
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def example_input(model: nn.Module, input_shape: tuple[int, ...], batch_size: int = 2) -> Tensor:
    """Return a batch of zeros of the model's dtype, on its device."""
    like = next(model.parameters(), torch.empty(0))
    return torch.zeros(batch_size, *input_shape, device=like.device, dtype=like.dtype)


def _layer_macs(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    if isinstance(module, _ConvNd):
        positions = inputs if module.transposed else output
        return positions.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        return parameters * (output.numel() // module.out_features)
    if isinstance(module, nn.ReLU):
        return output.numel()
    if isinstance(module, _AvgPoolNd | _MaxPoolNd):
        size: Any = module.kernel_size
        return output.numel() * (size ** (output.ndim - 2) if isinstance(size, int) else math.prod(size))
    if isinstance(module, _AdaptiveAvgPoolNd | _AdaptiveMaxPoolNd):
        return inputs.numel()
    return 0
