"""The proxy is the leading slice of its network: storage, gradients, statistics, cost, and refused networks.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import DenseNet

from rayprune.nn.boundary import boundary_distance, pair_distances
from rayprune.nn.models import build_model
from rayprune.nn.steps.psp import Proxy, WithProxy

IMAGE = (3, 32, 32)
# Residual, with a concatenation, depthwise, and with a flattened map before the classifier.
NETWORKS = {
    "resnet8": (3, 16, 16),
    "resnet18": (3, 16, 16),
    "mlp": (6,),
    "densenet": (3, 16, 16),
    "mobilenet_v2": IMAGE,
    "flattened": (3, 8, 8),
}


def build(name: str, classes: int = 10) -> nn.Module:
    if name == "flattened":
        maps = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
        return nn.Sequential(*maps, nn.Linear(6 * 16, 12), nn.ReLU(), nn.Linear(12, classes))
    if name == "densenet":
        return DenseNet(growth_rate=8, block_config=(3, 2), num_init_features=10, num_classes=classes)
    if name == "mobilenet_v2":
        return build_model("torchvision:mobilenet_v2", num_classes=classes, input_shape=IMAGE, width_mult=0.5)
    return build_model(name, num_classes=classes, input_shape=NETWORKS[name])


def inputs_of(name: str, batch: int = 4) -> Tensor:
    return torch.randn(batch, *NETWORKS[name], generator=torch.Generator().manual_seed(1))


def gradients(network: nn.Module) -> dict[str, Tensor]:
    values = {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}
    network.zero_grad(set_to_none=True)
    return values


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Narrow8(nn.Module):
    """An independent ResNet-8 at half width: explicit slices, no patching, the batch's own statistics."""

    def __init__(self, network: Any, num_channels: int) -> None:
        super().__init__()
        self.network, self.num_channels = network, num_channels

    def conv(self, layer: Any, maps: Tensor, size: int) -> Tensor:
        return functional.conv2d(maps, layer.weight[:size, : maps.shape[1]], stride=layer.stride, padding=layer.padding)

    def norm(self, layer: Any, maps: Tensor) -> Tensor:
        size = maps.shape[1]
        return functional.batch_norm(maps, None, None, layer.weight[:size], layer.bias[:size], training=True)

    def forward(self, images: Tensor) -> Tensor:
        net, size = self.network, self.num_channels
        maps = self.norm(net.bn1, self.conv(net.conv1, images, size)).relu()
        for stage in net.stages:
            for block in stage:
                inner = self.norm(block.bn1, self.conv(block.conv1, maps, size)).relu()
                inner = self.norm(block.bn2, self.conv(block.conv2, inner, size))
                if not isinstance(block.shortcut, nn.Identity):
                    maps = self.norm(block.shortcut[1], self.conv(block.shortcut[0], maps, size))
                maps = (inner + maps).relu()
            size *= 2
        pooled = maps.mean(dim=(2, 3))
        return functional.linear(pooled, net.fc.weight[:, : pooled.shape[1]], net.fc.bias)


def test_the_proxy_equals_explicit_slices() -> None:
    network, images = build("resnet8"), inputs_of("resnet8", 8)
    proxy = Proxy(network, 0.5, NETWORKS["resnet8"])
    explicit = Narrow8(network, 8)
    logits, expected = proxy(images), explicit(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    ours = gradients(network)
    expected.square().sum().backward()
    theirs = gradients(network)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_stay_in_the_slice_and_add_up(name: str) -> None:
    network, inputs = build(name), inputs_of(name)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    proxy = Proxy(network, 0.5, NETWORKS[name])
    assert list(proxy.parameters()) == []
    network.zero_grad(set_to_none=True)
    network(inputs).square().sum().backward()
    of_network = gradients(network)
    proxy(inputs).square().sum().backward()
    of_proxy = gradients(network)
    layers = dict(network.named_modules())
    head = [path for path, layer in layers.items() if isinstance(layer, nn.Linear)][-1]
    assert of_proxy.keys() == of_network.keys()
    for path, gradient in of_proxy.items():
        layer = layers[path.rpartition(".")[0]]
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and path.rpartition(".")[0] != head:
            half = len(gradient) // 2
            assert gradient[half:].count_nonzero() == 0, path
            assert gradient[:half].count_nonzero() > 0, path
        if path == f"{head}.weight":
            assert gradient[:, proxy.head_features :].count_nonzero() == 0
            assert (gradient[:, : proxy.head_features].count_nonzero(dim=1) > 0).all()
    network(inputs).square().sum().backward()
    proxy(inputs).square().sum().backward()
    both = gradients(network)
    for path, gradient in both.items():
        torch.testing.assert_close(gradient, of_network[path] + of_proxy[path], rtol=1e-3, atol=1e-4, msg=path)


def test_the_slice_shares_the_networks_storage() -> None:
    network, inputs = build("mlp"), inputs_of("mlp")
    proxy = Proxy(network, 0.5, NETWORKS["mlp"])
    before = proxy(inputs)
    with torch.no_grad():
        network.layers[0].weight[128:] += 1.0  # outside the slice
        network.layers[2].weight[:, 128:] += 1.0
    assert torch.equal(proxy(inputs), before)
    with torch.no_grad():
        network.layers[0].weight[:128] += 1.0
    assert not torch.equal(proxy(inputs), before)
    assert not any("forward" in vars(module) for module in network.modules())


@pytest.mark.parametrize("name", ["resnet8", "densenet", "mobilenet_v2"])
def test_each_width_has_its_own_statistics(name: str) -> None:
    network, inputs = build(name), inputs_of(name)
    before = copy_state(network)
    proxy = Proxy(network, 0.5, NETWORKS[name])
    assert is_unchanged(network, before)
    assert network.training
    fresh = copy_state(proxy)
    proxy(inputs)
    assert is_unchanged(network, before)
    moved = copy_state(proxy)
    assert sum(not torch.equal(moved[key], fresh[key]) for key in fresh) == len(fresh)
    network(inputs)
    assert is_unchanged(proxy, moved)
    assert not is_unchanged(network, before)
    network.eval()
    proxy(inputs)
    assert is_unchanged(proxy, moved)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "densenet"])
def test_at_full_width_the_proxy_is_the_network(name: str) -> None:
    network = build(name)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pair = WithProxy(network, 1.0, NETWORKS[name])
    proxy = pair.proxy
    assert pair.mac_ratio == 1.0
    head = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    table = pair_distances(head.weight[:, : proxy.head_features])
    inputs = inputs_of(name)
    for trained in (False, True):
        if trained:
            network.train()
            for seed in range(3):
                batch = torch.randn(4, *NETWORKS[name], generator=torch.Generator().manual_seed(seed))
                assert torch.equal(network(batch), proxy(batch))
        network.eval()
        with torch.no_grad():
            full, narrow = network(inputs), proxy(inputs)
        assert full.std() > 0
        assert torch.equal(boundary_distance(full, table), boundary_distance(narrow, table))


def test_statistics_are_saved_and_moved_with_the_proxy() -> None:
    network, images = build("resnet8"), inputs_of("resnet8")
    proxy = Proxy(network, 0.5, NETWORKS["resnet8"])
    shapes = {name: tuple(value.shape) for name, value in proxy.state_dict().items()}
    assert shapes["norms.0.running_mean"] == (8,)
    assert len(shapes) == 3 * len([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    proxy(images)
    other = Proxy(network, 0.5, NETWORKS["resnet8"])
    other.load_state_dict(proxy.state_dict())
    network.eval()
    assert torch.equal(other(images), proxy(images))
    double = copy.deepcopy(nn.ModuleList([network, proxy])).double()
    assert double[1].norms[0].running_mean.dtype == torch.float64
    torch.testing.assert_close(double[1](images.double()).float(), proxy(images), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        double[0].fc.bias += 1.0  # a copy slices the copied network
    assert not torch.allclose(double[1](images.double()).float(), proxy(images))


def test_cumulative_frozen_and_absent_statistics_follow_torch() -> None:
    for options in ({"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.3}):
        network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4, **options), nn.Flatten(), nn.Linear(12, 3))
        proxy = Proxy(network, 1.0, (2, 5))
        for seed in range(3):
            batch = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(network(batch), proxy(batch))
            if seed == 1:
                network[1].eval()
        network.eval()
        assert torch.equal(network(batch), proxy(batch))


def test_the_proxy_runs_in_channels_last_and_under_autocast() -> None:
    network, images = build("resnet8"), inputs_of("resnet8")
    proxy = Proxy(network, 0.5, NETWORKS["resnet8"])
    network.eval()
    expected = proxy(images)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(proxy(images.to(memory_format=torch.channels_last)), expected, rtol=1e-4, atol=1e-5)
    network.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = proxy(images.to(memory_format=torch.channels_last))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    gradient = network.conv1.weight.grad
    assert gradient.dtype == torch.float32
    assert gradient[8:].count_nonzero() == 0 < gradient[:8].count_nonzero()


def test_proxies_of_resnet18_cost_the_published_fraction() -> None:
    network = build_model("resnet18", num_classes=10, input_shape=IMAGE)
    for width, ratio in ((0.5, 0.2508), (0.25, 0.0631)):
        pair = WithProxy(network, width, IMAGE)
        assert pair.mac_ratio == pytest.approx(ratio, abs=0.00005)
        assert pair.proxy.head_features == 512 * width


def test_group_norm_layer_norm_and_padding_modes_are_sliced() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )
    images = torch.randn(4, 1, 6, 6)
    assert torch.allclose(Proxy(network, 1.0, (1, 6, 6))(images), network(images), atol=1e-6)
    small = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 3),
    )
    with torch.no_grad():
        for ours, theirs in zip(small.parameters(), network.parameters(), strict=True):
            ours.copy_(theirs[tuple(slice(size) for size in ours.shape)])
            theirs.mul_(1.0)
    assert torch.allclose(Proxy(network, 0.5, (1, 6, 6))(images), small(images), atol=1e-6)


class Fixed(nn.Module):
    """A network whose forward fixes a size: the features, or the batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).view(-1, self.size) if self.size else self.conv(images).view(2, 8, 4)[:, :, 0])


class OwnConv(nn.Conv2d):
    """A subclass that does not compute a convolution."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * 2.0


def in_front(*layers: nn.Module, features: int = 8) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 2))


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "transposed": (in_front(nn.ConvTranspose2d(3, 8, 1)), (3, 1, 1), r"'0' of the network \(ConvTranspose2d\)"),
    "grouped": (in_front(nn.Conv2d(4, 8, 1, groups=2)), (4, 1, 1), r"'0' of the network \(Conv2d with 2 groups\)"),
    "a subclass": (in_front(OwnConv(3, 8, 1)), (3, 1, 1), r"'0' of the network \(OwnConv\)"),
    "several axes": (in_front(nn.LayerNorm((2, 4))), (2, 4), r"'0' of the network \(LayerNorm\)"),
    "attention": (in_front(nn.TransformerEncoderLayer(8, 2), features=8), (8,), r"'0.self_attn.in_proj_weight'"),
    "a fixed size": (Fixed(32), (3, 4, 4), r"returns \(1, 2\) for a batch of 2, not \(2, 2\).*fixes a size"),
    "groups that do not divide": (
        in_front(nn.Conv2d(3, 8, 1), nn.GroupNorm(8, 8), features=32),
        (3, 2, 2),
        "can't run at width 0.5: .*divisible",
    ),
    "no linear layer": (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), (3, 1, 1), "not the output of an nn.Linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_network_that_cannot_be_sliced_is_refused_with_the_layers_name(case: str) -> None:
    network, shape, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as refused:
        Proxy(network, 0.5, shape)
    assert "\n" not in str(refused.value)
    assert "proxy_width=null" in str(refused.value) or case == "no linear layer"
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_class_token_is_refused_with_its_name() -> None:
    network = in_front(nn.Linear(4, 8))
    network.register_parameter("class_token", nn.Parameter(torch.zeros(8)))
    with pytest.raises(ValueError, match="'class_token' of the network"):
        Proxy(network, 0.5, (4,))


def test_a_width_without_channels_is_refused_with_one_that_works() -> None:
    network = build_model("resnet8", num_classes=2, input_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"layer 'conv1', which has 16: use at least 0\.0625"):
        Proxy(network, 0.06, (3, 8, 8))
    assert Proxy(network, 0.0625, (3, 8, 8)).head_features == 4
    for sizes, smallest in (((3, 9), 0.3334), ((7, 100), 0.1429)):
        mlp = build_model("mlp", num_classes=2, input_shape=(4,), hidden=sizes)
        with pytest.raises(ValueError, match=f"use at least {smallest}"):
            Proxy(mlp, smallest - 0.0001, (4,))
        Proxy(mlp, smallest, (4,))
    for width in (0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"width must be in \(0, 1\]"):
            Proxy(network, width, (3, 8, 8))
    # A depthwise layer on the image itself has as many channels as the image.
    over_image = in_front(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 8, 1))
    assert Proxy(over_image, 0.25, (3, 1, 1)).head_features == 2
