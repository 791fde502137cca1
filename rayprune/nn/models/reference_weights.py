"""Weights of the published MSDNet and RANet programs in our networks.

The authors' programs in PyTorch have the same layers under other names; that of L2W-DEN is built on MSDNet's. Those of
MSDNet:

    ours                                  theirs
    stem.scales.S.I                       blocks.0.0.layers.S.net.I (ImageNet's finest scale: blocks.0.0.layers.0.I)
    blocks.B.J.scales.S.down.I            blocks.B.J.layers.S.conv_down.net.I
    blocks.B.J.scales.S.normal.I          blocks.B.J.layers.S.conv_normal.net.I
    blocks.B.J.scales.S.I (transition)    blocks.B.J.m.S.net.I
    classifiers.K.L.I, classifiers.K.4    classifier.K.m.L.net.I, classifier.K.linear

In block 0 their J is one higher, because the stem is its first layer. RANet's classifiers have the same names. The
rest:

    ours                                  theirs
    stem.scales.S.I                       FirstLayer.layers.S.net.I (ImageNet's finest scale: FirstLayer.layers.0.I)
    sub_networks.N.blocks.B.              scale_flows.N.B.
        layers.J.I (dense block)              layers.J.conv_normal.net.I
        layers.J.normal.I (fusion block)      layers.J.conv_normal.net.I
        layers.J.up.I                         layers.J.conv_up.net.I
        last.I                                conv_last.net.I
        transition.I                          trans.net.I
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rayprune.errors import ConfigError
from rayprune.nn.models.msdnet import MSDNet
from rayprune.nn.models.ranet import RANet

_LINEAR = 4  # the position of the linear layer in our classifiers
_COUNTER = "num_batches_tracked"  # of batch normalization; programs before PyTorch 0.4.1 did not save it


def reference_names(model: nn.Module) -> dict[str, str]:
    """Return our name → the published program's name of every parameter and buffer, in the order of our state_dict.

    Raises:
        ConfigError: the model is neither an MSDNet nor a RANet.

    >>> names = reference_names(MSDNet(num_classes=100, input_shape=(3, 32, 32)))
    >>> names["blocks.0.0.scales.1.down.3.weight"], names["classifiers.2.4.bias"]
    ('blocks.0.1.layers.1.conv_down.net.3.weight', 'classifier.2.linear.bias')
    >>> names = reference_names(RANet(num_classes=100, input_shape=(3, 32, 32)))
    >>> names["sub_networks.1.blocks.0.layers.1.up.3.weight"]
    'scale_flows.1.0.layers.1.conv_up.net.3.weight'
    """
    if isinstance(model, MSDNet):
        stem_name = "blocks.0.0"
    elif isinstance(model, RANet):
        stem_name = "FirstLayer"
    else:
        raise ConfigError(
            f"only the names of the published MSDNet and RANet are known, and the model is a {type(model).__name__}"
        )
    imagenet_stem = isinstance(model.stem.scales[0][-1], nn.MaxPool2d)  # type: ignore[index]
    names = {}
    for name in model.state_dict():
        part, first, rest = name.split(".", 2)
        if part == "stem":
            scale, inner = rest.split(".", 1)
            names[name] = f"{stem_name}.layers.{scale}.{'' if imagenet_stem and scale == '0' else 'net.'}{inner}"
        elif part == "classifiers":
            layer, inner = rest.split(".", 1)
            names[name] = f"classifier.{first}.{'linear' if layer == str(_LINEAR) else f'm.{layer}.net'}.{inner}"
        else:
            names[name] = (_msdnet_name if isinstance(model, MSDNet) else _ranet_name)(first, rest)
    return names


def load_reference(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load the published program's weights.

    Args:
        model: an MSDNet or a RANet with the options that the weights were trained with.
        state: a state_dict of the program, or a checkpoint with one under "state_dict"; the prefix "module." of a
            DataParallel model is removed.

    Raises:
        ConfigError: the model is no MSDNet or RANet, or a name or shape differs; the model is then unchanged.
    """
    names = reference_names(model)
    tensors: Mapping[str, Tensor] = state.get("state_dict", state)
    found = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    loaded = {}
    for name, own in model.state_dict().items():
        reference = names[name]
        if reference not in found and name.endswith(_COUNTER):
            loaded[name] = own
        elif reference not in found:
            raise ConfigError(
                f"the weights have no {reference!r}: build the model with the options they were trained with"
            )
        elif found[reference].shape != own.shape:
            shapes = f"{tuple(found[reference].shape)} in the weights and {tuple(own.shape)} in the model"
            raise ConfigError(f"{reference!r} is {shapes}: build the model with the options they were trained with")
        else:
            loaded[name] = found.pop(reference)
    if unknown := next((name for name in found if name not in names.values()), None):
        raise ConfigError(f"the model has no {unknown!r}: build it with the options that the weights were trained with")
    model.load_state_dict(loaded)


def _msdnet_name(block: str, rest: str) -> str:
    found = re.fullmatch(r"(\d+)\.scales\.(\d+)\.(?:(down|normal)\.)?(.*)", rest)
    assert found is not None, rest
    position, scale, connection, inner = found.groups()
    number = int(position) + (block == "0")
    if connection is None:
        return f"blocks.{block}.{number}.m.{scale}.net.{inner}"
    return f"blocks.{block}.{number}.layers.{scale}.conv_{connection}.net.{inner}"


def _ranet_name(network: str, rest: str) -> str:
    found = re.fullmatch(r"blocks\.(\d+)\.(?:layers\.(\d+)\.(?:(up|normal)\.)?|(last|transition)\.)(.*)", rest)
    assert found is not None, rest
    block, layer, connection, at_end, inner = found.groups()
    if layer is None:
        part = "conv_last" if at_end == "last" else "trans"
    else:
        part = f"layers.{layer}.conv_{connection or 'normal'}"
    return f"scale_flows.{network}.{block}.{part}.net.{inner}"
