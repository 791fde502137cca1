"""Networks with exits: their interface, gradient equilibrium, torch's operations on them, and wrong options.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional

from rayprune.nn.early_exit import num_exits_of
from rayprune.nn.models import build_model
from rayprune.nn.models.multi_exit import MultiExitModel, balance_gradients

SMALL = {
    "msdnet": {"num_blocks": 3, "channels": 4, "growth_rate": 2},
    "ranet": {"channels": 4, "growth_rate": 4, "step": 1},
}


def network(name: str, side: int = 16, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_model(name, num_classes=5, input_shape=(3, side, side), **{**SMALL[name], **options})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_begin_and_advance_give_the_forward_pass(name: str, training: bool) -> None:
    model = network(name).train(training)
    assert isinstance(model, MultiExitModel)
    images = torch.randn(4, 3, 16, 16)
    whole = copy.deepcopy(model)(images)
    assert num_exits_of(whole) == model.num_exits
    state = model.begin(images)
    for exit, expected in enumerate(whole):
        logits, state = model.advance(exit, state)
        assert torch.equal(logits, expected)


def test_gradient_equilibrium_by_hand() -> None:
    features = torch.tensor([2.0], requires_grad=True)
    x, classifiers = features, torch.tensor([5.0, 7.0, 11.0])
    loss = torch.zeros(())
    for exit, weight in enumerate(classifiers):
        own, x = balance_gradients(x, exit, 3)
        loss = loss + (weight * own).sum()
        x = 2 * x
    loss.backward()
    at_2 = 11.0
    at_1 = (7 + 1 * 2 * at_2) / 2
    at_0 = (5 + 2 * 2 * at_1) / 3
    assert features.grad is not None
    torch.testing.assert_close(features.grad, torch.tensor([at_0]))
    assert loss.item() == pytest.approx(2 * 5 + 4 * 7 + 8 * 11)


@pytest.mark.parametrize("name", SMALL)
def test_gradient_equilibrium_inside_a_network(name: str) -> None:
    """Compare the gradient of an exit's map with the plain network's two gradients, separated by hand."""
    model = network(name, gradient_equilibrium=True).double().eval()
    plain = network(name).double().eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    for logits, expected in zip(model(images), plain(images), strict=True):
        assert torch.equal(logits, expected)
    exit = model.num_exits - 2  # the following gradient, the last classifier's, is not rescaled
    gradients = [map_gradients(network, images, exit) for network in (model, plain)]
    (balanced, _, _), (_, own, following) = gradients
    torch.testing.assert_close(balanced, (own + following) / 2)
    assert not torch.allclose(own, following)


def map_gradients(model: Any, images: Tensor, exit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the map after an exit's block: of all losses, of the exit's own, of the later ones."""
    maps: list[Tensor] = []
    block = model.blocks[exit] if hasattr(model, "blocks") else model.sub_networks[model.owners[exit]].blocks[exit]

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        maps.append(output[-1] if hasattr(model, "blocks") else output[0])

    hook = block.register_forward_hook(keep)
    losses = [logits.square().sum() for logits in model(images)]
    hook.remove()
    parts = (sum(losses), losses[exit], sum(losses[exit + 1 :]))
    own, each, later = (torch.autograd.grad(part, maps[0], retain_graph=True)[0] for part in parts)  # type: ignore[arg-type]
    return own, each, later


@pytest.mark.parametrize("gradient_equilibrium", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_forward_mode_agrees_with_reverse_mode(name: str, gradient_equilibrium: bool) -> None:
    model = network(name, gradient_equilibrium=gradient_equilibrium).double()
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    direction = {key: torch.randn_like(value) for key, value in parameters.items()}
    images, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        exits = functional_call(model, {**parameters, **{k: v.clone() for k, v in buffers.items()}}, (images,))
        return torch.stack([functional.cross_entropy(logits, labels) for logits in exits]).sum()

    _, forward = jvp(loss, (parameters,), (direction,))
    tracked = {key: value.requires_grad_() for key, value in parameters.items()}
    gradients = torch.autograd.grad(loss(tracked), list(tracked.values()))
    pairs = zip(gradients, direction.values(), strict=True)
    torch.testing.assert_close(forward, sum((g * d).sum() for g, d in pairs))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SMALL)
def test_functional_call_leaves_the_model_alone(name: str) -> None:
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    values = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(4, 3, 16, 16)
    exits = functional_call(model, values, (images,))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for logits, expected in zip(exits, model(images), strict=True):
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", SMALL)
def test_state_dicts_and_channels_last(name: str) -> None:
    model = network(name)
    model(torch.randn(8, 3, 16, 16))
    other = network(name)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    images = torch.randn(4, 3, 16, 16)
    model.eval(), other.eval()
    with torch.no_grad():
        expected = model(images)
        assert all(torch.equal(*pair) for pair in zip(other(images), expected, strict=True))
        logits = other.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "options", "num_exits"),
    [
        ("msdnet", (1, 8, 8), {}, 5),
        ("msdnet", (1, 8, 8), {"num_scales": 3, "num_blocks": 2}, 2),
        ("msdnet", (1, 32, 32), {"num_scales": 4, "num_blocks": 2, "step_mode": "even"}, 2),
        ("msdnet", (1, 16, 16), {"num_scales": 3, "num_blocks": 4, "step_mode": "even"}, 4),
        ("msdnet", (1, 28, 28), {"bottleneck": False, "num_blocks": 3}, 3),
        ("msdnet", (3, 37, 50), {"num_blocks": 3}, 3),
        ("msdnet", (3, 64, 64), {"num_blocks": 2, "growth_rate": 3}, 2),
        ("msdnet", (3, 96, 96), {"num_blocks": 2}, 2),
        ("ranet", (1, 8, 8), {}, 4),
        ("ranet", (1, 8, 8), {"scales": [1, 2, 3]}, 6),
        ("ranet", (1, 28, 28), {"bottleneck": False, "scales": [1, 1, 2]}, 6),
        ("ranet", (3, 37, 50), {"scales": [1, 2]}, 4),
        ("ranet", (3, 4, 4), {}, 2),
    ],
)
def test_images_of_all_sizes_train(name: str, shape: tuple[int, ...], options: dict[str, Any], num_exits: int) -> None:
    model: Any = build_model(name, num_classes=5, input_shape=shape, **options)
    exits = model(torch.randn(3, *shape))
    assert num_exits_of(exits) == num_exits
    assert exits[0].shape == (3, 5)
    torch.stack([functional.cross_entropy(logits, torch.tensor([0, 1, 4])) for logits in exits]).sum().backward()
    unused = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert not unused


def test_initial_weights_are_as_published() -> None:
    model = build_model("msdnet", num_classes=100, input_shape=(3, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            size = module.kernel_size[0] ** 2 * module.out_channels
            assert module.weight.std().item() == pytest.approx((2 / size) ** 0.5, rel=0.06)
            assert module.bias is None
        if isinstance(module, nn.Linear):
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("msdnet", {"num_blocks": 1}, "has at least 2, not 1: give it more blocks"),
        ("msdnet", {"growth_rate": 1}, "needs growth_rate of at least 2, got 1"),
        ("msdnet", {"base": 0}, "needs base of at least 1, a whole number, got 0"),
        ("msdnet", {"step_mode": "lg"}, "no step_mode 'lg': choose even or lin_grow"),
        ("msdnet", {"reduction": 0}, "reduction above 0 and at most 1, got 0"),
        ("msdnet", {"stem": "mnist"}, "no stem 'mnist': choose one of cifar, imagenet"),
        ("msdnet", {"num_scales": 6}, "can't have 6 scales for images of 16×16: .* give num_scales of 1 to 5"),
        ("msdnet", {"num_scales": 2, "growth_factors": [1, 2, 4]}, "growth_factors of 2 numbers .* got \\[1, 2, 4\\]"),
        ("msdnet", {"bottleneck_factors": [1, 2]}, "bottleneck_factors of 3 numbers"),
        ("msdnet", {"nblocks": 3}, "model 'msdnet' takes no 'nblocks': did you mean 'num_blocks'"),
        ("msdnet", {"input_shape": (64,)}, "for numeric features use 'mlp'"),
        ("msdnet", {"num_blocks": "3"}, "model.num_blocks = '3': must be a whole number"),
        ("msdnet", {"growth_factors": 2}, "growth_factors = 2: must be a list of whole numbers"),
        ("ranet", {"scales": 3}, "scales = 3: must be a list of whole numbers"),
        ("ranet", {"bottleneck_factors": [1, 2, "4"]}, "must be a list of whole numbers"),
        ("ranet", {"scales": [1, 3]}, "scales that start at 1 and rise by 0 or 1, got \\[1, 3\\]"),
        ("ranet", {"scales": []}, "scales that start at 1"),
        ("ranet", {"scales": [1, 2, 3, 4, 5, 6]}, "give scales of 1 to 5"),
        ("ranet", {"scales": [1], "num_blocks": 1}, "has at least 2, not 1"),
        ("ranet", {"compress_factor": 1.0}, "compress_factor above 0 and below 1, got 1.0"),
        ("ranet", {"growth_rate": 3}, "takes 0.25 of 3 channels .* raise growth_rate or compress_factor"),
        ("ranet", {"block_step": 0}, "needs block_step of at least 1, a whole number, got 0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_model(name, **{"num_classes": 10, "input_shape": (3, 16, 16), **options})
    assert "\n" not in str(caught.value)
