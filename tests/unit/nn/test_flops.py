"""Exit costs follow the published rule, and counting them does not change the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayprune.nn.flops import exit_macs, num_macs
from rayprune.nn.models import build_model
from rayprune.nn.models.multi_exit import MultiExit

SMALL = {
    "msdnet": {"num_blocks": 3, "channels": 4, "growth_rate": 2},
    "ranet": {"channels": 4, "growth_rate": 4, "step": 1},
}


class Chain(MultiExit):
    """Three linear layers of 6 units with a classifier each; no norms, no ReLU but one."""

    def __init__(self) -> None:
        super().__init__(3)
        self.trunk = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(3))
        self.relu = nn.ReLU()

    def advance(self, exit: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.trunk[exit](state)
        return self.heads[exit](self.relu(state) if exit == 1 else state), state


def test_a_forward_pass_of_resnet18_costs_the_published_count() -> None:
    network = build_model("resnet18", num_classes=10, input_shape=(3, 32, 32)).eval()
    assert num_macs(network, torch.zeros(1, 3, 32, 32)) / 1e6 == pytest.approx(555.42, abs=0.005)


def test_linear_layers_and_relu_are_counted_by_the_published_rule() -> None:
    model = Chain()
    assert exit_macs(model, (6,)) == [42 + 24, 2 * (42 + 24) + 6, 3 * (42 + 24) + 6]


def test_convolutions_and_pooling_are_counted_by_the_published_rule() -> None:
    class Pools(MultiExit):
        def __init__(self) -> None:
            super().__init__(2)
            self.first = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
            self.pools = nn.ModuleList([nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d((2, 4))])
            self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

        def advance(self, exit: int, state: Tensor) -> tuple[Tensor, Tensor]:
            state = self.first(state) if exit == 0 else state
            return self.last(self.pools[exit](state)), state

    convolution, relu = 6 * 64 * (2 * 9), 6 * 64
    first = convolution + relu + 6 * 16 * 9 + 6 * 16
    assert exit_macs(Pools(), (4, 8, 8)) == [first, first + 6 * 8 * 8 + 6 * 8]


@pytest.mark.parametrize("name", SMALL)
def test_counting_does_not_change_the_model(name: str) -> None:
    model: Any = build_model(name, num_classes=5, input_shape=(3, 16, 16), **SMALL[name])
    model.stem.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    costs = exit_macs(model, (3, 16, 16))
    assert costs == sorted(set(costs))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_network_that_cannot_run_exit_by_exit_is_refused() -> None:
    class Whole(nn.Module):
        num_exits = 2

    with pytest.raises(
        ValueError, match=r"Whole can't be run exit by exit, it lacks begin, advance: add num_exits, beg"
    ):
        exit_macs(Whole(), (3,))
