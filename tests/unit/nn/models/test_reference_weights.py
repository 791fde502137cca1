"""The published program's weights of MSDNet: its names, and its logits after they are loaded."""

from __future__ import annotations

import json
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
        (build_model("ranet", num_classes=10, input_shape=(3, 32, 32)), state, "MSDNet are known, and the .* a RANet"),
    ]
    for model, wrong, message in cases:
        before = {name: own.clone() for name, own in model.state_dict().items()}
        with pytest.raises(ValueError, match=message) as caught:
            load_reference(model, wrong)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
