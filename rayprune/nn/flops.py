"""What every exit of a network costs, in multiply-accumulates.

The rule is that of the published MSDNet program, so that its figures can be compared: a convolution counts its
products and no bias, a linear layer its weights and bias, a ReLU its elements, pooling the elements of each window for
each output; normalisation, resizing and whatever is no module of these kinds count nothing.

Shapes: K exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _MaxPoolNd,
)

from rayprune.errors import ConfigError
from rayprune.nn.boundary import eval_mode
from rayprune.nn.models.multi_exit import MultiExitModel

POOLING = (_AvgPoolNd, _MaxPoolNd)
ADAPTIVE_POOLING = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)


def exit_macs(model: nn.Module, input_shape: tuple[int, ...]) -> list[int]:
    """Count the multiply-accumulates of one sample up to each exit, the earlier classifiers included.

    The model's mode and buffers stay as they are; on the meta device nothing is computed.

    Args:
        model: with `num_exits`, `begin` and `advance` of `rayprune.nn.models.multi_exit`.
        input_shape: of one sample as the model sees it.

    Returns:
        K numbers, increasing.

    Raises:
        ValueError: the model can't be run exit by exit.
    """
    counted: list[int] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counted.append(_macs(module, inputs[0], output))

    return [sum(counted) for _ in _exits(model, input_shape, count)]


def exit_parameters(model: nn.Module, input_shape: tuple[int, ...]) -> list[int]:
    """Count the parameters that one sample meets up to each exit, the earlier classifiers included.

    Args:
        model, input_shape: see `exit_macs`.

    Returns:
        K numbers; the last is the model's own where every parameter is of use.

    Raises:
        ValueError: the model can't be run exit by exit.
    """
    met: dict[nn.Parameter, int] = {}

    def meet(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        met.update((parameter, parameter.numel()) for parameter in module.parameters(recurse=False))

    return [sum(met.values()) for _ in _exits(model, input_shape, meet)]


def check_stepwise(model: nn.Module) -> None:
    """Refuse a model that can't be run exit by exit.

    Raises:
        ValueError: saying what it lacks.
    """
    lacks = [name for name in ("num_exits", "begin", "advance") if not hasattr(model, name)]
    if lacks:
        raise ConfigError(
            f"{type(model).__name__} can't be run exit by exit, it lacks {', '.join(lacks)}: add num_exits, "
            "begin(inputs) -> state and advance(exit, state) -> (logits, state)"
        )


def _exits(model: nn.Module, input_shape: tuple[int, ...], hook: Callable[..., None]) -> Iterator[None]:
    """Run one sample exit by exit, calling the hook after every module's forward; yield after each exit."""
    check_stepwise(model)
    assert isinstance(model, MultiExitModel)
    like = next(model.parameters(), torch.empty(0))
    sample = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(hook) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            state = model.begin(sample)
            for exit in range(model.num_exits):
                _, state = model.advance(exit, state)
                yield
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _macs(module: nn.Module, inputs: Tensor, output: Tensor) -> int:
    if isinstance(module, _ConvNd):
        values = inputs if module.transposed else output
        return values.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        return parameters * (output.numel() // module.out_features)
    if isinstance(module, nn.ReLU):
        return output.numel()
    if isinstance(module, POOLING):
        size: Any = module.kernel_size
        return output.numel() * (size ** (output.ndim - 2) if isinstance(size, int) else math.prod(size))
    if isinstance(module, ADAPTIVE_POOLING):
        return inputs.numel()
    return 0


def num_macs(model: Callable[[Tensor], Tensor], example: Tensor) -> int:
    """Count the multiply-adds of one forward, of convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which no training needs

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops()) // 2


def mac_ratio(network: nn.Module, proxy: nn.Module, input_shape: tuple[int, ...]) -> float:
    """Return the proxy's multiply-adds relative to the network's, φ.

    Args:
        network: the one that the proxy slices.
        input_shape: of one sample.
    """
    example = example_input(network, input_shape)
    with eval_mode(network):
        return num_macs(proxy, example) / num_macs(network, example)


def example_input(network: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """Return a batch of two zero samples where the network is."""
    parameter = next(network.parameters())
    return torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype)
