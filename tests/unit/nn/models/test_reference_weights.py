"""The published programs' weights of MSDNet and RANet: their names, and MSDNet's logits after they are loaded."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.nn.models import build_model, load_reference, reference_names
from tests.support.paths import GOLDEN

with np.load(GOLDEN / "l2w_forward_msd_cifar100.npz", allow_pickle=False) as arrays:
    NAMES: list[tuple[str, list[int]]] = json.loads(str(arrays["names"]))
    LOGITS = torch.from_numpy(arrays["logits_eval"])


def msdnet(num_blocks: int = 5, **options: Any) -> torch.nn.Module:
    return build_model("msdnet", num_classes=100, input_shape=(3, 32, 32), num_blocks=num_blocks, **options).double()


def published_state() -> dict[str, torch.Tensor]:
    """Return the weights under the program's names, in which it has computed the logits; see the golden file."""
    state = {}
    for index, (name, shape) in enumerate(NAMES):
        steps = torch.arange(np.prod(shape), dtype=torch.float64)
        if len(shape) >= 2:
            values = torch.sin(0.37 * steps + index) * (2 / (steps.numel() / shape[0])) ** 0.5
        else:
            values = 1 + 0.1 * torch.sin(steps + index) if name.endswith("weight") else 0.1 * torch.cos(steps + index)
        state[name] = values.reshape(shape)
        if len(shape) == 1 and name.endswith("bias") and "linear" not in name:
            norm = name.removesuffix("bias")
            state |= {f"{norm}running_mean": torch.zeros(shape), f"{norm}running_var": torch.ones(shape)}
    return state


def test_the_names_are_those_of_the_published_program() -> None:
    model = msdnet()
    names = reference_names(model)
    assert [[names[name], list(own.shape)] for name, own in model.named_parameters()] == NAMES
    assert len(set(names.values())) == len(names) == len(model.state_dict())
    assert {names[name] for name, _ in model.named_buffers()} >= {f"{name}" for name in published_state()} - {
        name for name, _ in NAMES
    }


@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_a_model_with_published_weights_has_the_published_logits(as_checkpoint: bool) -> None:
    model, state = msdnet(), published_state()
    random = np.random.default_rng(0).permutation(list(state))  # names count, and not their order
    state = {str(name): state[name] for name in random}
    load_reference(
        model, {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}} if as_checkpoint else state
    )
    images = torch.sin(0.01 * torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)).reshape(4, 3, 32, 32)
    with torch.no_grad():
        logits = torch.stack(model.eval()(images))
    torch.testing.assert_close(logits, LOGITS, rtol=1e-9, atol=1e-9)


def test_imagenets_stem_has_names_of_its_own() -> None:
    with torch.device("meta"):
        model = build_model("msdnet_imagenet", num_classes=1000, input_shape=(3, 224, 224))
    names = reference_names(model)
    assert names["stem.scales.0.0.bias"] == "blocks.0.0.layers.0.0.bias"
    assert names["stem.scales.1.1.running_var"] == "blocks.0.0.layers.1.net.1.running_var"
    assert names["blocks.1.2.scales.0.0.weight"] == "blocks.1.2.m.0.net.0.weight"  # layer 6 of 20 drops a scale
    assert len(set(names.values())) == len(names)


def test_weights_of_another_network_are_refused_and_change_nothing() -> None:
    state = published_state()
    cases = [
        (msdnet(num_blocks=4), state, "the weights have no 'blocks.2.1.layers.0.conv_down"),
        (msdnet(num_blocks=7), state, "'blocks.2.2.layers.0.conv_.* in the weights|the weights have no"),
        (msdnet(growth_rate=8), state, r"\(6, 16, 1, 1\) in the weights and \(8, 16, 1, 1\) in the model: build"),
        (msdnet(), {name: own for name, own in state.items() if "linear" not in name}, "have no 'classifier.0.linear"),
        (msdnet(), {**state, "extra.weight": torch.zeros(1)}, "the model has no 'extra.weight'"),
        (
            build_model("ranet", num_classes=10, input_shape=(3, 32, 32)),
            state,
            "the weights have no 'FirstLayer.layers",
        ),
        (
            build_model("resnet8", num_classes=10, input_shape=(3, 32, 32)),
            state,
            "MSDNet and RANet are known, .* a ResNet",
        ),
    ]
    for model, wrong, message in cases:
        before = {name: own.clone() for name, own in model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as caught:
            load_reference(model, wrong)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())


Shapes = dict[str, tuple[int, ...]]


def batch_norm(name: str, width: int) -> Shapes:
    statistics = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (width,) for key in statistics} | {f"{name}.num_batches_tracked": ()}


def conv(name: str, before: int, after: int, size: int = 3) -> Shapes:
    """The program's convolution, batch normalization and ReLU."""
    return {f"{name}.net.0.weight": (after, before, size, size)} | batch_norm(f"{name}.net.1", after)


def bottleneck(name: str, before: int, after: int, factor: int) -> Shapes:
    inner = min(before, factor * after)
    shapes: Shapes = {f"{name}.net.0.weight": (inner, before, 1, 1)} | batch_norm(f"{name}.net.1", inner)
    return shapes | {f"{name}.net.3.weight": (after, inner, 3, 3)} | batch_norm(f"{name}.net.4", after)


def ranet_shapes(
    factors: list[int], *, channels: int, growth: int, steps: list[int], num_classes: int, imagenet: bool
) -> Shapes:
    """Name → shape of the published RANet's weights, for scales 1, 2, 3 … and two blocks more in each sub-network."""
    shapes: Shapes = {}
    stem = [channels * factor for factor in reversed(factors)]
    if imagenet:
        shapes |= {"FirstLayer.layers.0.0.weight": (stem[0], 3, 7, 7), "FirstLayer.layers.0.0.bias": (stem[0],)}
        shapes |= batch_norm("FirstLayer.layers.0.1", stem[0])
    else:
        shapes |= conv("FirstLayer.layers.0", 3, stem[0])
    for scale in range(1, len(stem)):
        shapes |= conv(f"FirstLayer.layers.{scale}", stem[scale - 1], stem[scale])
    lower: list[list[int]] = []  # the widths before and after the layers of the blocks below
    exit = 0
    for network, factor in enumerate(factors):
        width, own, num_blocks = channels * factor, [], 2 * network + 2
        g = growth * factor
        for block in range(num_blocks):
            name, count = f"scale_flows.{network}.{block}", steps[block]
            own.append([width + layer * g for layer in range(count + 1)])
            fuses = block < 2 * network
            for layer, before in enumerate(own[-1][:-1]):
                low = g // 4 if fuses else 0
                if fuses:
                    up = (lower[block][layer], low, factors[network - 1])
                    shapes |= bottleneck(f"{name}.layers.{layer}.conv_up", *up)
                shapes |= bottleneck(f"{name}.layers.{layer}.conv_normal", before, g - low, factor)
            width = own[-1][-1]
            if fuses:
                shapes |= conv(f"{name}.conv_last", lower[block][-1], width // 4, size=1)
                width += width // 4
            if block + 1 in {(stage + 1) * num_blocks // (network + 1) for stage in range(network)}:
                shapes |= conv(f"{name}.trans", width, width // 2, size=1)
                width //= 2
            if not fuses:
                inner = width if imagenet else 128
                shapes |= conv(f"classifier.{exit}.m.0", width, inner) | conv(f"classifier.{exit}.m.1", inner, inner)
                shapes |= {f"classifier.{exit}.linear.weight": (num_classes, inner)}
                shapes |= {f"classifier.{exit}.linear.bias": (num_classes,)}
                exit += 1
        lower = own
    return shapes


CIFAR_RANET = ranet_shapes(
    [4, 2, 1], channels=16, growth=6, steps=[2, 4, 6, 8, 10, 12], num_classes=100, imagenet=False
)


def test_the_names_and_shapes_of_ranet_are_those_of_the_published_program() -> None:
    large = {"factors": [4, 2, 2, 1], "channels": 32, "growth": 16, "steps": [8] * 8}
    for name, shape, classes, expected in (
        ("ranet", (3, 32, 32), 100, CIFAR_RANET),
        ("ranet_imagenet", (3, 224, 224), 1000, ranet_shapes(**large, num_classes=1000, imagenet=True)),
    ):
        with torch.device("meta"):
            model = build_model(name, num_classes=classes, input_shape=shape)
        names = reference_names(model)
        assert {names[key]: tuple(own.shape) for key, own in model.state_dict().items()} == expected
        assert len(set(names.values())) == len(names)
    trained = [np.prod(shape) for name, shape in CIFAR_RANET.items() if not re.search("running|tracked", name)]
    assert sum(trained) == 2_617_261  # the published number


def test_a_ranet_takes_published_weights() -> None:
    model = build_model("ranet", num_classes=100, input_shape=(3, 32, 32))
    draw = torch.Generator().manual_seed(0)
    # Weights of the order 1 / fan-in, and positive variances.
    state = {
        name: (torch.rand(shape, generator=draw) + 0.5) / max(np.prod(shape[1:]), 1) if shape else torch.tensor(7)
        for name, shape in CIFAR_RANET.items()
    }
    load_reference(model, {"state_dict": {f"module.{name}": own for name, own in state.items()}})
    names = reference_names(model)
    assert all(torch.equal(own, state[names[name]]) for name, own in model.state_dict().items())
    assert (
        names["sub_networks.2.blocks.3.layers.0.normal.0.weight"] == "scale_flows.2.3.layers.0.conv_normal.net.0.weight"
    )
    assert names["sub_networks.1.blocks.1.transition.1.bias"] == "scale_flows.1.1.trans.net.1.bias"
    with torch.no_grad():
        logits = model.eval()(torch.rand(2, 3, 32, 32, generator=draw))
    assert [tuple(each.shape) for each in logits] == [(2, 100)] * 6
    assert all(each.isfinite().all() for each in logits)
    del state["scale_flows.1.0.conv_last.net.0.weight"]
    with pytest.raises(ValueError, match=r"the weights have no 'scale_flows.1.0.conv_last.net.0.weight': build"):
        load_reference(model, state)
