"""The leading slice of one layer: which layers have one, and what it computes.

Channels keep their order through a network, so that the first outputs of one layer are the first inputs of the next,
flattened maps included. How many inputs a slice has is told by what it is given.

Slimmable networks (Yu, Yang, Xu, Yang, Huang, ICLR 2019, arXiv 1812.08928) have one batch normalisation a width; here
they share its affine parameters and have running statistics of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

Narrow = Callable[[Tensor], Tensor]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = (functional.conv1d, functional.conv2d, functional.conv3d)
_SLICED: tuple[type[Any], ...] = (*CONVOLUTIONS, nn.Linear, *BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
WITHOUT_PROXY = "set method.proxy_width=null to select with the whole network"


def sliceable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return name → layer of all that is to be sliced.

    Raises:
        ValueError: something else has parameters or running statistics.
    """
    layers = {}
    for name, module in network.named_modules():
        if _is_known(module):
            layers[name] = module
            continue
        own = [parameter for parameter, value in module._parameters.items() if value is not None]
        if own or isinstance(module, BATCH_NORMS):
            # A container's own parameter, such as a class token, is named itself.
            path = ".".join(part for part in (name, *own[: any(module.children())]) if part)
            groups = f" with {module.groups} groups" if _is_depthwise(module) else ""
            raise ValueError(
                f"{path!r} of the network ({type(module).__name__}{groups}) can't be sliced for a proxy: "
                f"{WITHOUT_PROXY}"
            )
    return layers


def check_width(layers: dict[str, nn.Module], head: str, width: float) -> None:
    """Refuse a width that leaves a layer without outputs.

    Args:
        layers: of `sliceable_layers`.
        head: the layer that keeps all of its outputs.
        width: in (0, 1].

    Raises:
        ValueError: it is too small; with the smallest that is not.
    """
    counts = {name: _num_outputs(layer) for name, layer in layers.items() if name != head}
    name = min(counts, key=lambda name: counts[name], default=None)
    if name is not None and _share(counts[name], width) < 1:
        smallest = math.ceil(1e4 / counts[name]) / 1e4
        raise ValueError(
            f"width {width} leaves no channel of layer {name!r}, which has {counts[name]:.0f}: use at least {smallest}"
        )


def narrow(layer: Any, width: float) -> Narrow:
    """Return the forward of a layer's slice: a module of its own for a batch normalisation, which has statistics.

    Args:
        layer: of `sliceable_layers`.
        width: share of the layer's outputs, in (0, 1], rounded down; normalisations and depthwise convolutions have as
            many outputs as they are given inputs.
    """
    if isinstance(layer, BATCH_NORMS):
        return NarrowNorm(layer)
    if isinstance(layer, nn.Linear):
        return partial(_linear, layer, _share(layer.out_features, width))
    if isinstance(layer, nn.LayerNorm):
        return partial(_layer_norm, layer)
    if isinstance(layer, nn.GroupNorm):
        return partial(_group_norm, layer)
    return partial(_convolution, layer, _share(layer.out_channels, width))


class NarrowNorm(nn.Module):
    """The leading channels of a batch normalisation, with running statistics of their own.

    They begin as the slice of the layer's at the first call, as only that shows how many channels there are: after a
    concatenation it is not the width's share.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its parameters are not this module's too
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise (B, channels, …) as the layer does in its mode."""
        layer: Any = self._layer[0]
        channels = inputs.shape[1]
        if self.running_mean is None and layer.running_mean is not None:
            self.running_mean = layer.running_mean[:channels].clone()
            self.running_var = layer.running_var[:channels].clone()
            self.num_batches_tracked = layer.num_batches_tracked.clone()
        momentum = 0.0 if layer.momentum is None else layer.momentum
        if layer.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if layer.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        return functional.batch_norm(
            inputs,
            self.running_mean,
            self.running_var,
            _leading(layer.weight, channels),
            _leading(layer.bias, channels),
            layer.training or self.running_mean is None,
            momentum,
            layer.eps,
        )


def _convolution(layer: Any, num_outputs: int, inputs: Tensor) -> Tensor:
    channels, groups = inputs.shape[1], 1
    if _is_depthwise(layer):
        num_outputs, groups = channels * (layer.out_channels // layer.in_channels), channels
        weight = layer.weight[:num_outputs]
    else:
        weight = layer.weight[:num_outputs, :channels]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        inputs = functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    convolve = _CONVOLVE[layer.weight.ndim - 3]
    bias = _leading(layer.bias, num_outputs)
    return convolve(inputs, weight, bias, layer.stride, padding, layer.dilation, groups)


def _linear(layer: nn.Linear, num_outputs: int, inputs: Tensor) -> Tensor:
    weight = layer.weight[:num_outputs, : inputs.shape[-1]]
    return functional.linear(inputs, weight, _leading(layer.bias, num_outputs))


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor) -> Tensor:
    size = inputs.shape[-1]
    return functional.layer_norm(inputs, (size,), _leading(layer.weight, size), _leading(layer.bias, size), layer.eps)


def _group_norm(layer: nn.GroupNorm, inputs: Tensor) -> Tensor:
    size = inputs.shape[1]
    weight, bias = _leading(layer.weight, size), _leading(layer.bias, size)
    return functional.group_norm(inputs, layer.num_groups, weight, bias, layer.eps)


def _is_known(module: Any) -> bool:
    # A subclass that computes something else, and a forward that someone has replaced, can't be sliced.
    if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _SLICED):
        return False
    if "forward" in vars(module) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1):
        return False
    return not _is_depthwise(module) or module.groups == module.in_channels


def _is_depthwise(layer: Any) -> bool:
    """Tell convolutions of several groups; those of less groups than inputs are refused."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1


def _num_outputs(layer: Any) -> float:
    """Return how many outputs the width is a share of; infinitely many where the inputs tell."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) and layer.groups == 1 else math.inf


def _leading(values: Tensor | None, size: int) -> Tensor | None:
    return None if values is None else values[:size]


def _share(size: float, width: float) -> int:
    return math.floor(min(width * size + 1e-9, 2.0**31))  # .29 × 100 is 28.999…
