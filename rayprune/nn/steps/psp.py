"""The step that trains a network together with its parameter-sharing proxy (DynaMS, Wang et al., ICLR 2023).

The recipe is that of slimmable networks (Yu, Yang, Xu, Yang, Huang, ICLR 2019, arXiv 1812.08928), without their
distillation: the same batch goes through the whole network and then through the proxy, the gradients of both losses add
up, and the optimizer steps once. The paper's own code is not public.

The proxy is a leading slice of every layer and needs no storage of its own: every layer keeps its first channels, and
the classifier keeps all classes. The slicing needs no knowledge of the architecture. While the proxy's forward runs,
each layer with parameters computes the first `width` of its outputs from as many of its inputs as it receives; the
code between the layers, shortcuts and concatenations included, is the network's own. Channels keep their order through
a network, so the first outputs of one layer are the first inputs of the next, flattened maps included. Activation
checkpointing does not work: a layer that is recomputed in the backward pass has its full width again, and torch refuses
the shapes.

Slimmable networks have one batch normalization per width; here the widths share its affine parameters and have running
statistics of their own.

Shapes: B rows of this worker's part of the batch, C classes, D features of the last layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.errors import ConfigError
from rayprune.nn.boundary import PairDistances, eval_mode, last_linear
from rayprune.nn.flops import example_input, num_macs
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.registry import register_step

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SLICEABLE: tuple[type[Any], ...] = (*CONVOLUTIONS, nn.Linear, *BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
_WITHOUT_PROXY = "set method.proxy_width=null to select with the whole network"


@register_step("psp")
class PspStep(PlainStep):
    """Take one optimization step on a weighted batch for a network and its proxy.

    The step's signals are those of the whole network; `evaluate(part="proxy")` returns the proxy's.

    Args:
        model: what `module_of` returned for `width`, DDP-wrapped or not.
        weight: of the proxy's loss, above 0.
        optimizer, **recipe: arguments of PlainStep; the parameters are the network's.

    Raises:
        ConfigError: the weight is outside its range.
    """

    options_class = None
    compilable = False
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
            raise ConfigError(f"the proxy's weight must be above 0, got {weight}")
        assert isinstance(self._module, WithProxy), "the model must be what module_of returned"
        self._weight, self._pair, self._network = weight, self._module, self._module.network
        self._pair_distances["proxy"] = PairDistances(self._pair.proxy.head_features)
        self.train_cost = 1.0 + self._pair.mac_ratio

    @staticmethod
    def module_of(
        network: nn.Module, input_shape: tuple[int, ...], *, width: float = 0.25, **options: Any
    ) -> WithProxy:
        """Return the network with its proxy.

        Raises:
            ConfigError: the width leaves a layer without channels, or the network cannot be sliced.
        """
        return WithProxy(network, width, input_shape)

    def state_dict(self) -> dict[str, Any]:
        """Return the proxy's running statistics."""
        return {"proxy": dict(self._pair.proxy.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state, {"proxy"})
        self._pair.proxy.load_state_dict(state["proxy"])

    def buffers(self) -> Iterator[Tensor]:
        """Yield the proxy's running statistics."""
        return self._pair.proxy.buffers()

    def relative_cost(self, part: str = "model") -> float:
        """Return 1 for the model, φ for the proxy."""
        return self._pair.mac_ratio if self._check_part(part) == "proxy" else 1.0

    def _eval_logits(self, inputs: Tensor, part: str) -> Tensor:
        return self._pair(inputs, part=part)

    def _backward(
        self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor, rows: int, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        # DDP reduces the accumulated gradients in the very last backward pass.
        outputs = self._pass(inputs, targets_B, weights_B, rows, synchronize=False)
        self._pass(inputs, targets_B, weights_B, rows, synchronize=last, factor=self._weight, part="proxy")
        return outputs


class WithProxy(nn.Module):
    """A network and its proxy as one module, so that DDP reduces the gradients of both and shares their buffers.

    Args:
        network, width, input_shape: as for `Proxy`.

    Attributes:
        mac_ratio: multiply-adds of the proxy relative to the network's, φ.
    """

    def __init__(self, network: nn.Module, width: float, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.proxy = Proxy(network, width, input_shape)
        example = example_input(network, input_shape)
        with eval_mode(network):
            self.mac_ratio = num_macs(self.proxy, example) / num_macs(network, example)

    def forward(self, inputs: Tensor, part: str = "model") -> Tensor:
        """Return the logits (B, C) of a part: "model" or "proxy"."""
        return self.proxy(inputs) if part == "proxy" else self.network(inputs)


class Proxy(nn.Module):
    """Run the leading slice of a network.

    It holds the running statistics of its batch normalizations, and only a reference to the network: it has no
    parameters. One forward pass at a time: while it runs, the network's layers are narrow.

    Args:
        network: (B, …) inputs to (B, C) logits that one of its nn.Linear returns.
        width: fraction of each layer's outputs, in (0, 1], rounded down.
        input_shape: of one sample.

    Attributes:
        head_features: D of the classifier's slice.

    Raises:
        ConfigError: a width outside its range or too small, or a network that cannot be sliced.
    """

    def __init__(self, network: nn.Module, width: float, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        if not 0.0 < width <= 1.0:
            raise ConfigError(f"the proxy's width must be in (0, 1], got {width}")
        self.width = width
        self._network = (network,)  # in a tuple, so that its parameters do not become this module's
        layers = _sliceable_layers(network)
        example = example_input(network, input_shape)
        head = last_linear(network, example)
        _check_width(layers, head, width)
        self._forwards = [(layer, _narrow(layer, 1.0 if name == head else width)) for name, layer in layers.items()]
        self.norms = nn.ModuleList(forward for _, forward in self._forwards if isinstance(forward, NarrowNorm))
        self.head_features = self._try_out(example, network.get_submodule(head))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the proxy's logits, (B, C)."""
        # An instance attribute hides the class's method, and hooks still run.
        try:
            for layer, forward in self._forwards:
                vars(layer)["forward"] = forward
            logits: Tensor = self._network[0](inputs)
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)
        return logits

    @torch.no_grad()
    def _try_out(self, example: Tensor, head: nn.Module) -> int:
        """Run once, which also gives the statistics their sizes; return the classifier's number of features."""
        features: list[int] = []
        handle = head.register_forward_pre_hook(lambda _layer, inputs: features.append(inputs[0].shape[-1]))
        network = self._network[0]
        try:
            with eval_mode(network):
                expected, shape = tuple(network(example).shape), tuple(self(example).shape)
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            raise ConfigError(
                f"the network can't run at width {self.width}: {type(error).__name__}: {line}; {_WITHOUT_PROXY}"
            ) from error
        finally:
            handle.remove()
        if shape != expected:
            raise ConfigError(
                f"at width {self.width} the network returns {shape} for a batch of 2, not {expected}: its forward "
                f"fixes a size; {_WITHOUT_PROXY}"
            )
        return features[-1]


class NarrowNorm(nn.Module):
    """The leading channels of a batch normalization, with running statistics of their own.

    They start as the slice of the layer's at the first call, which alone shows the number of channels: after a
    concatenation it is not the width's fraction.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that its parameters do not become this module's
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize (B, channels, …) as the layer does in its mode."""
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


def _sliceable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return name → layer of all layers to slice.

    Raises:
        ConfigError: another module has parameters or running statistics.
    """
    layers = {}
    for name, module in network.named_modules():
        if _is_sliceable(module):
            layers[name] = module
            continue
        own = [parameter for parameter, value in module._parameters.items() if value is not None]
        if own or isinstance(module, BATCH_NORMS):
            # For a container's own parameter, such as a class token, the parameter is named.
            path = ".".join(part for part in (name, *own[: any(module.children())]) if part)
            groups = f" with {module.groups} groups" if _is_grouped(module) else ""
            raise ConfigError(
                f"{path!r} of the network ({type(module).__name__}{groups}) can't be sliced for a proxy: "
                f"{_WITHOUT_PROXY}"
            )
    return layers


def _is_sliceable(module: Any) -> bool:
    # A subclass that computes something else, or a replaced forward, cannot be sliced.
    if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in _SLICEABLE):
        return False
    if "forward" in vars(module) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1):
        return False
    return not _is_grouped(module) or module.groups == module.in_channels


def _is_grouped(layer: Any) -> bool:
    """Tell whether a layer is a convolution of several groups; only depthwise ones can be sliced."""
    return isinstance(layer, CONVOLUTIONS) and layer.groups > 1


def _check_width(layers: dict[str, nn.Module], head: str, width: float) -> None:
    """Refuse a width that leaves a layer other than the head without outputs, with the smallest width that works."""
    counts = {name: _num_outputs(layer) for name, layer in layers.items() if name != head}
    name = min(counts, key=lambda name: counts[name], default=None)
    if name is not None and _num_leading(counts[name], width) < 1:
        smallest = math.ceil(1e4 / counts[name]) / 1e4
        raise ConfigError(
            f"width {width} leaves no channel of layer {name!r}, which has {counts[name]:.0f}: use at least {smallest}"
        )


def _num_outputs(layer: Any) -> float:
    """Return the number of outputs to slice; infinity for layers that have as many outputs as inputs."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, CONVOLUTIONS) and layer.groups == 1 else math.inf


def _num_leading(size: float, width: float) -> int:
    return math.floor(min(width * size + 1e-9, 2.0**31))  # .29 × 100 is 28.999…


def _narrow(layer: Any, width: float) -> Callable[[Tensor], Tensor]:
    """Return the forward of a layer's slice; for a batch normalization a module, which holds its statistics.

    Normalizations and depthwise convolutions have as many outputs as inputs, whatever the width.
    """
    if isinstance(layer, BATCH_NORMS):
        return NarrowNorm(layer)
    if isinstance(layer, nn.Linear):
        return partial(_linear, layer, _num_leading(layer.out_features, width))
    if isinstance(layer, nn.LayerNorm):
        return partial(_layer_norm, layer)
    if isinstance(layer, nn.GroupNorm):
        return partial(_group_norm, layer)
    return partial(_convolution, layer, _num_leading(layer.out_channels, width))


def _convolution(layer: Any, num_outputs: int, inputs: Tensor) -> Tensor:
    channels = inputs.shape[1]
    weight = layer.weight
    if _is_grouped(layer):
        num_outputs = channels * (layer.out_channels // layer.in_channels)
        layer = copy.copy(layer)
        layer.groups = channels
    else:
        weight = weight[:, :channels]
    return layer._conv_forward(inputs, weight[:num_outputs], _leading(layer.bias, num_outputs))


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


def _leading(values: Tensor | None, size: int) -> Tensor | None:
    return None if values is None else values[:size]
