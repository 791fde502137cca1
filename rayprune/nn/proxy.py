"""A parameter-sharing proxy: a leading slice of every layer of a network, which needs no storage of its own.

The proxy is that of DynaMS (Wang et al., ICLR 2023), the slicing that of slimmable networks (Yu, Yang, Xu, Yang, Huang,
ICLR 2019, arXiv 1812.08928): every layer keeps its first channels, and the classifier keeps all classes.

Nothing is known here of the network's shape. While the proxy's forward runs, each layer with parameters computes with
the first `width` of its outputs and as many of its inputs as it is given (`rayprune.nn.narrow`); what lies between the
layers, shortcuts and concatenations included, is the network's own code. A layer that recomputes itself in the backward
pass (activation checkpointing) would do so at full width, and torch then refuses the shapes.

Shapes: B batch, C classes, D features of the last layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rayprune.nn.boundary import eval_mode, last_linear
from rayprune.nn.narrow import WITHOUT_PROXY, Narrow, NarrowNorm, check_width, narrow, sliceable_layers


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
            raise ValueError(f"the proxy's width must be in (0, 1], got {width}")
        self.width = width
        self._network = (network,)  # in a tuple, so that its parameters are not this module's too
        layers = sliceable_layers(network)
        example = _example(network, input_shape)
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
            raise ValueError(
                f"the network can't run at width {self.width}: {type(error).__name__}: {line}; {WITHOUT_PROXY}"
            ) from error
        finally:
            handle.remove()
        if found != expected:
            raise ValueError(
                f"at width {self.width} the network returns {tuple(found)} for a batch of 2, not {tuple(expected)}: "
                f"its forward fixes a size; {WITHOUT_PROXY}"
            )
        return seen[-1]


def num_macs(model: Callable[[Tensor], Tensor], example: Tensor) -> int:
    """Count the multiply-adds of one forward, of convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which no training needs

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return int(counter.get_total_flops()) // 2


def mac_ratio(network: nn.Module, proxy: Proxy, input_shape: tuple[int, ...]) -> float:
    """Return the proxy's multiply-adds relative to the network's, φ.

    Args:
        network: the one that the proxy slices.
        input_shape: of one sample.
    """
    example = _example(network, input_shape)
    with eval_mode(network):
        return num_macs(proxy, example) / num_macs(network, example)


def _example(network: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """Return a batch of two zero samples where the network is."""
    parameter = next(network.parameters())
    return torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype)
