"""Models by name: parameter counts of the papers' networks, shapes, and errors with the cure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional

from rayprune.errors import ConfigError
from rayprune.nn.models import MODELS, build_model


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet8", 78_042),
        ("resnet56", 855_770),
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=10, input_shape=(3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "resnet50"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 40, 28)])
def test_image_models_take_small_and_odd_images(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(name, num_classes=7, input_shape=shape)
    images = torch.randn(2, *shape)
    functional.cross_entropy(model(images), torch.tensor([0, 6])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        alone, batch = model(images[:1]), model(images)
    assert batch.shape == (2, 7)
    torch.testing.assert_close(alone, batch[:1], rtol=1e-3, atol=1e-4)


def test_a_basic_block_computes_the_papers_formula() -> None:
    model = build_model("resnet8", num_classes=3, input_shape=(3, 8, 8)).eval()
    block = model.get_submodule("stages.1.0")
    inputs = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        residual = block.bn2(block.conv2(block.bn1(block.conv1(inputs)).clamp(min=0)))  # type: ignore[operator]
        shortcut = functional.conv2d(inputs[:, :, ::2, ::2], block.shortcut[0].weight)  # type: ignore[index]
        expected = (residual + block.shortcut[1](shortcut)).clamp(min=0)  # type: ignore[index]
        torch.testing.assert_close(block(inputs), expected)


def test_channels_last_gives_the_same_logits() -> None:
    model = build_model("resnet8", num_classes=3, input_shape=(3, 16, 16)).eval()
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = model(images)
        logits = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (1, 8, 8)])
def test_the_mlp_takes_features_and_images(shape: tuple[int, ...]) -> None:
    model = build_model("mlp", num_classes=4, input_shape=shape)
    assert model(torch.randn(3, *shape)).shape == (3, 4)
    assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [256, 256, 4]


def test_features_return_the_embedding() -> None:
    for name, size in (("resnet8", 64), ("mlp", 256)):
        model: Any = build_model(name, num_classes=4, input_shape=(1, 8, 8)).eval()
        embedding = model.features(torch.randn(3, 1, 8, 8))
        assert embedding.shape == (3, size)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_torchvision_models_take_any_number_of_channels(channels: int) -> None:
    model = build_model("torchvision:resnet18", num_classes=6, input_shape=(channels, 32, 32)).eval()
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (first.in_channels, first.kernel_size, first.stride, first.padding) == (channels, (7, 7), (2, 2), (3, 3))
    assert first.bias is None
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 6)


def test_torchvision_options_reach_the_model() -> None:
    shape = (1, 32, 32)
    model = build_model(
        "torchvision:mobilenet_v3_small", num_classes=6, input_shape=shape, dropout=0.4, reduced_tail=True
    )
    assert 0.4 in [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    with pytest.raises(
        ValueError, match=r"model 'torchvision:resnet18' can't be built \(.*'depth'.*\): correct the options"
    ):
        build_model("torchvision:resnet18", num_classes=6, input_shape=shape, depth=3)


def test_models_with_auxiliary_heads_still_return_logits() -> None:
    model = build_model("torchvision:googlenet", num_classes=3, input_shape=(3, 32, 32), init_weights=False).train()
    assert isinstance(model(torch.randn(2, 3, 32, 32)), torch.Tensor)


def test_a_users_function_builds_a_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(*, num_classes, input_shape, bias=True):\n"
        "    return nn.Linear(input_shape[0], num_classes, bias=bias)\n"
        "def nothing(num_classes, input_shape):\n"
        "    return None\n"
        "number = 3\n"
    )
    model = build_model(f"{file}:net", num_classes=2, input_shape=(5,), bias=False)
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features, model.bias) == (5, 2, None)
    with pytest.raises(ValueError, match=r"nothing' must return a torch.nn.Module, got NoneType"):
        build_model(f"{file}:nothing", num_classes=2, input_shape=(5,))
    with pytest.raises(ValueError, match="number' is of type int, not a function"):
        build_model(f"{file}:number", num_classes=2, input_shape=(5,))
    with pytest.raises(ValueError, match="takes no 'bais': did you mean 'bias'"):
        build_model(f"{file}:net", num_classes=2, input_shape=(5,), bais=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet9", {}, "unknown model 'resnet9': did you mean 'resnet"),
        ("torchvision:resnet19", {}, "unknown torchvision model 'resnet19': did you mean 'resnet"),
        ("resnet8", {"input_shape": (64,)}, "for numeric features use 'mlp'"),
        ("torchvision:resnet18", {"input_shape": (64,)}, "for numeric features use 'mlp'"),
        ("resnet8", {"input_shape": (8, 8)}, "input_shape must be"),
        ("resnet8", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("resnet8", {"width": 3}, "model 'resnet8' takes no 'width': there is none, leave it out"),
        ("mlp", {"hidden": (0,)}, "hidden must be widths of at least 1"),
    ],
)
def test_wrong_models_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, **{"num_classes": 10, "input_shape": (3, 32, 32), **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"hidden": 3}, "model.hidden = 3: must be a list of whole numbers"),
        ("msdnet", {"channels": "many"}, "model.channels = 'many': must be a whole number"),
        ("mlp", {"hidden": [10**9]}, r"model.hidden = \[1000000000\]: must be at most 1,000,000"),
        ("mlp", {"hidden": [10**6, 10**6]}, r"model 'mlp' has weights of 4012\.\d GB"),
        ("msdnet", {"num_blocks": 10**12}, "model.num_blocks = 1000000000000: must be at most 100"),
        ("ranet", {"block_step": 10**9}, "model.block_step = 1000000000: must be at most 100"),
        ("msdnet", {"growth_rate": 10**5}, r"model 'msdnet' has weights of \d+\.\d GB"),
        ("torchvision:resnet50", {"width_per_group": 10**5}, "model 'torchvision:resnet50' has weights of"),
    ],
)
def test_a_model_that_would_fill_the_memory_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    before = psutil.Process().memory_info().rss
    with pytest.raises(ConfigError, match=message):
        build_model(name, num_classes=10, input_shape=(3, 32, 32), **options)
    assert psutil.Process().memory_info().rss < before + 200e6


def test_counting_the_weights_changes_no_draw() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(4, 3).weight
    torch.manual_seed(0)
    model = build_model("mlp", num_classes=3, input_shape=(4,), hidden=())
    assert torch.equal(model.fc.weight, expected)


def test_importing_the_models_loads_neither_ray_nor_torchvision() -> None:
    program = "import sys, rayprune.nn.models; print({'ray', 'torchvision'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


def test_the_built_in_models_are_registered() -> None:
    expected = {"resnet8", "resnet18", "resnet34", "resnet50", "mlp", "msdnet", "msdnet_imagenet", "ranet"}
    assert expected <= set(MODELS)
