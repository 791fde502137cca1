"""MSDNet and RANet against the published programs' numbers: parameters, multiply-accumulates, logits.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.nn.flops import example_input, exit_macs
from rayprune.nn.models import build_model
from tests.support.paths import GOLDEN

EVEN = {"step_mode": "even"}
CIFAR = {
    "dyn5": ("msdnet", {"num_blocks": 5}),
    "dyn7": ("msdnet", {"num_blocks": 7}),
    "any7": ("msdnet", {"num_blocks": 7, "base": 4, "step": 2, **EVEN}),
    "123_lg2": ("ranet", {}),
    "123_even4": ("ranet", {"step": 4, **EVEN}),
    "1233_even4": ("ranet", {"scales": [1, 2, 3, 3], "step": 4, **EVEN}),
}
IMAGENET = {
    "step4": ("msdnet_imagenet", {}),
    "step6": ("msdnet_imagenet", {"step": 6}),
    "step7": ("msdnet_imagenet", {"step": 7}),
    "step6b4": ("msdnet_imagenet", {"step": 6, "base": 4}),
    "step7b4": ("msdnet_imagenet", {"step": 7, "base": 4}),
    "4221_c32": ("ranet_imagenet", {}),
    "4221_c64": ("ranet_imagenet", {"channels": 64}),
    "sh_4211": ("ranet_imagenet", {"channels": 16, "growth_factors": [4, 2, 1, 1]}),
}


@cache
def counts() -> dict[str, Any]:
    families = json.loads((GOLDEN / "model_counts.json").read_text())
    return {**families["msdnet"], **families["ranet"]}


def published(key: str) -> tuple[torch.nn.Module, tuple[int, int, int]]:
    """Return the network of a key of model_counts.json, on the meta device, and its input shape."""
    data, configuration = key.split("_", 1)
    name, options = (IMAGENET if data == "in" else CIFAR)[configuration]
    shape = (3, 224, 224) if data == "in" else (3, 32, 32)
    with torch.device("meta"):
        model = build_model(
            name, num_classes={"in": 1000, "c100": 100, "c10": 10}[data], input_shape=shape, **dict(options)
        )
    return model, shape


def exit_parameters(model: Any, input_shape: tuple[int, int, int]) -> list[int]:
    """Return the number of parameters that one sample uses up to each exit."""
    used: dict[torch.nn.Parameter, int] = {}

    def add(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        used.update((parameter, parameter.numel()) for parameter in module.parameters(recurse=False))

    for module in model.eval().modules():
        module.register_forward_hook(add)
    state, totals = model.begin(example_input(model, input_shape)), []
    for exit in range(model.num_exits):
        _, state = model.advance(exit, state)
        totals.append(sum(used.values()))
    return totals


@pytest.mark.parametrize("key", counts())
def test_parameters_and_macs_are_the_published_ones(key: str) -> None:
    model, shape = published(key)
    expected = counts()[key]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["total"]
    assert exit_macs(model, shape) == expected["flops"]
    assert exit_parameters(model, shape) == expected["cumparams"]


def fill(model: torch.nn.Module) -> None:
    """Set every parameter to the golden file's values."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        steps = torch.arange(parameter.numel(), dtype=torch.float64)
        if parameter.ndim >= 2:
            values = torch.sin(0.37 * steps + index) * (2 / (parameter.numel() / parameter.shape[0])) ** 0.5
        elif name.endswith("weight"):
            values = 1 + 0.1 * torch.sin(steps + index)
        else:
            values = 0.1 * torch.cos(steps + index)
        parameter.data.copy_(values.reshape(parameter.shape))


@pytest.mark.parametrize("training", [False, True])
def test_the_logits_are_the_published_ones(training: bool) -> None:
    with np.load(GOLDEN / "l2w_forward_msd_cifar100.npz", allow_pickle=False) as arrays:
        names = json.loads(str(arrays["names"]))
        expected = torch.from_numpy(arrays["logits_train" if training else "logits_eval"])
    model = build_model("msdnet", num_classes=100, input_shape=(3, 32, 32), num_blocks=5).double()
    assert [list(parameter.shape) for parameter in model.parameters()] == [shape for _, shape in names]
    fill(model)
    images = torch.sin(0.01 * torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)).reshape(4, 3, 32, 32)
    with torch.no_grad():
        logits = torch.stack(model.train(training)(images))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
