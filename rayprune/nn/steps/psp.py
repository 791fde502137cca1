"""The step that trains a network together with its parameter-sharing proxy (DynaMS, Wang et al., ICLR 2023).

The recipe is that of slimmable networks (Yu et al., ICLR 2019, arXiv 1812.08928), without their distillation: the same
batch goes through the whole network and then through the slice, the gradients of both losses add up, and the optimiser
steps once. The paper's own code is not public.

Shapes: B rows of this worker's share of the batch, C classes.

A parameter-sharing proxy: a leading slice of every layer of a network, which needs no storage of its own.

The proxy is that of DynaMS (Wang et al., ICLR 2023), the slicing that of slimmable networks (Yu, Yang, Xu, Yang, Huang,
ICLR 2019, arXiv 1812.08928): every layer keeps its first channels, and the classifier keeps all classes.

Nothing is known here of the network's shape. While the proxy's forward runs, each layer with parameters computes with
the first `width` of its outputs and as many of its inputs as it is given (see `narrow`); what lies between the
layers, shortcuts and concatenations included, is the network's own code. A layer that recomputes itself in the backward
pass (activation checkpointing) would do so at full width, and torch then refuses the shapes.

Shapes: B batch, C classes, D features of the last layer.

The leading slice of one layer: which layers have one, and what it computes.

Channels keep their order through a network, so that the first outputs of one layer are the first inputs of the next,
flattened maps included. How many inputs a slice has is told by what it is given.

Slimmable networks (Yu, Yang, Xu, Yang, Huang, ICLR 2019, arXiv 1812.08928) have one batch normalisation a width; here
they share its affine parameters and have running statistics of their own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.errors import ConfigError
from rayprune.nn.boundary import PairDistances, eval_mode, last_linear
from rayprune.nn.flops import example_input, mac_ratio
from rayprune.nn.steps.plain import PlainStep

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
            raise ConfigError(
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
        raise ConfigError(
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


class Proxy(nn.Module):
    """Run the leading slice of a network.

    It holds the running statistics of its batch normalisations and refers to the network without holding it: it has no
    parameters. One forward at a time: while it runs, the network's layers are narrow.

    Args:
        network: (B, …) inputs to (B, C) logits that one of its nn.Linear gives.
        width: share of each layer's outputs, in (0, 1], rounded down.
        input_shape: of one sample.

    Attributes:
        head_features: D of the classifier's slice.

    Raises:
        ValueError: a width outside its range or too small, or a network that can't be sliced; with the cure.
    """

    def __init__(self, network: nn.Module, width: float, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        if not 0.0 < width <= 1.0:
            raise ConfigError(f"the proxy's width must be in (0, 1], got {width}")
        self.width = width
        self._network = (network,)  # in a tuple, so that its parameters are not this module's too
        layers = sliceable_layers(network)
        example = example_input(network, input_shape)
        head = last_linear(network, example)
        check_width(layers, head, width)
        self._forwards: list[tuple[nn.Module, Narrow]] = [
            (layer, narrow(layer, width if name != head else 1.0)) for name, layer in layers.items()
        ]
        self.norms = nn.ModuleList(forward for _, forward in self._forwards if isinstance(forward, NarrowNorm))
        self.head_features = self._try_out(example, network.get_submodule(head))

    def forward(self, inputs: Tensor) -> Tensor:
        """Give the proxy's logits, (B, C)."""
        with self._narrowed():
            logits: Tensor = self._network[0](inputs)
        return logits

    @contextlib.contextmanager
    def _narrowed(self) -> Iterator[None]:
        # An attribute of the instance goes before the class's method, and hooks still run.
        try:
            for layer, forward in self._forwards:
                vars(layer)["forward"] = forward
            yield
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)

    @torch.no_grad()
    def _try_out(self, example: Tensor, head: nn.Module) -> int:
        """Run once, which also gives the statistics their sizes; return the classifier's number of features."""
        seen: list[int] = []
        handle = head.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].shape[-1]))
        network = self._network[0]
        try:
            with eval_mode(network):
                expected, found = network(example).shape, self(example).shape
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            raise ConfigError(
                f"the network can't run at width {self.width}: {type(error).__name__}: {line}; {WITHOUT_PROXY}"
            ) from error
        finally:
            handle.remove()
        if found != expected:
            raise ConfigError(
                f"at width {self.width} the network returns {tuple(found)} for a batch of 2, not {tuple(expected)}: "
                f"its forward fixes a size; {WITHOUT_PROXY}"
            )
        return seen[-1]


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
            raise ConfigError(f"the proxy's weight must be above 0, got {weight}")
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
            raise ConfigError(f"the state of another train step (it holds {', '.join(sorted(state)[:3])}): not taken")
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
