"""Early exit gives the whole network's predictions and computes nothing for rows that have left.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayprune.nn.early_exit import EarlyExit, count_exits, num_exits_of, select_rows
from rayprune.nn.flops import exit_macs
from rayprune.nn.models import build_model
from rayprune.nn.models.multi_exit import MultiExit
from rayprune.nn.signals import max_probability
from tests.support.multi_exit_models import tower

INF = float("inf")
SHAPE = (3, 16, 16)
SMALL = {
    "msdnet": {"num_blocks": 4, "channels": 4, "growth_rate": 2},
    "ranet": {"channels": 4, "growth_rate": 4, "step": 1},
}
Pair = namedtuple("Pair", ["left", "right"])


def trained(name: str) -> Any:
    """Return a network in eval mode whose batch normalizations have statistics of some images."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, input_shape=SHAPE, **SMALL[name]).double()
    for _ in range(3):
        model(torch.randn(16, *SHAPE, dtype=torch.float64))
    return model.eval()


def naive_predictions(model: nn.Module, images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Choose each row's exit from the whole forward pass."""
    with torch.no_grad():
        whole = model(images)
    exits = []
    for row in range(len(images)):
        confident = [k for k, logits in enumerate(whole) if logits[row].softmax(0).max() >= thresholds[k]]
        exits.append(min([*confident, len(whole) - 1]))
    return torch.stack([whole[k][row] for row, k in enumerate(exits)]), torch.tensor(exits)


def find_thresholds(model: nn.Module, images: Tensor) -> list[float]:
    """Return thresholds at which some rows leave at every exit."""
    with torch.no_grad():
        return [max_probability(logits).quantile(0.8).item() for logits in model(images)[:-1]] + [-INF]


@pytest.mark.parametrize("name", SMALL)
def test_the_predictions_are_those_of_the_whole_network(name: str) -> None:
    model, images = trained(name), torch.randn(40, *SHAPE, dtype=torch.float64)
    thresholds = find_thresholds(model, images)
    expected, expected_exits = naive_predictions(model, images, thresholds)
    assert len(expected_exits.unique()) == model.num_exits
    logits, exits = EarlyExit(model, thresholds).predict(images)
    assert exits.dtype == torch.int64
    assert torch.equal(exits, expected_exits)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert not logits.requires_grad
    for row in range(6):
        alone, exit = EarlyExit(model, thresholds[:-1]).predict(images[row : row + 1])
        assert exit.tolist() == [expected_exits[row]]
        torch.testing.assert_close(alone, expected[row : row + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_only_rows_that_have_not_left_are_computed(name: str) -> None:
    """The multiply-accumulates of all modules add up to the costs of the rows' exits."""
    model, images = trained(name), torch.randn(24, *SHAPE, dtype=torch.float64)
    early = EarlyExit(model, find_thresholds(model, images))
    computed: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            computed.append(output.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Linear):
            computed.append(len(output) * sum(parameter.numel() for parameter in module.parameters()))
        elif isinstance(module, nn.ReLU):
            computed.append(output.numel())
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            computed.append(inputs[0].numel())

    costs = torch.tensor(exit_macs(model, SHAPE))
    for module in model.modules():
        module.register_forward_hook(count)
    _, exits = early.predict(images)
    assert sum(computed) == costs[exits].sum()
    for max_exit in range(model.num_exits):
        computed.clear()
        _, exits = early.predict(images, max_exit=max_exit)
        assert exits.max() == max_exit
        assert sum(computed) == costs[exits].sum()


class Counted(MultiExit):
    """Return logits [x, 0] at each of 3 exits, and record the exits' batch sizes."""

    def __init__(self) -> None:
        super().__init__(3)
        self.sizes: list[tuple[int, int]] = []

    def advance(self, exit: int, state: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append((exit, len(state)))
        return torch.stack([state, torch.zeros_like(state)], dim=1), state + 1


def test_nothing_runs_after_all_rows_have_left() -> None:
    model = Counted().eval()
    threshold = max_probability(torch.tensor([[1.0, 0.0]])).item()
    logits, exits = EarlyExit(model, [threshold, threshold, -INF]).predict(torch.tensor([2.0, 0.0, 1.0]))
    assert exits.tolist() == [0, 1, 0]  # a row whose confidence equals the threshold leaves
    assert logits[:, 0].tolist() == [2.0, 1.0, 1.0]
    assert model.sizes == [(0, 3), (1, 1)]
    model.sizes.clear()
    assert EarlyExit(model, [INF, INF]).predict(torch.zeros(2))[1].tolist() == [2, 2]
    assert model.sizes == [(0, 2), (1, 2), (2, 2)]
    model.sizes.clear()
    assert EarlyExit(model, [INF, INF]).predict(torch.zeros(2), max_exit=0)[1].tolist() == [0, 0]
    assert model.sizes == [(0, 2)]
    assert EarlyExit(model, [-INF, INF]).predict(torch.zeros(2))[1].tolist() == [0, 0]


def test_rows_of_nan_go_to_the_last_exit() -> None:
    logits, exits = EarlyExit(Counted().eval(), [0.5, 0.5]).predict(torch.tensor([float("nan"), 3.0]))
    assert exits.tolist() == [2, 0]
    assert logits[0].isnan().any()


def test_rows_are_selected_from_lists_and_tuples() -> None:
    state = [torch.arange(4), (torch.arange(8).reshape(4, 2), []), Pair(torch.zeros(4), torch.ones(4))]
    first, (second, third), pair = select_rows(state, torch.tensor([3, 1]), 4)
    assert first.tolist() == [3, 1]
    assert second.tolist() == [[6, 7], [2, 3]]
    assert third == []
    assert isinstance(pair, Pair)
    assert len(pair.right) == 2
    with pytest.raises(ValueError, match=r"holds a tensor \(3,\) for a batch of 4: .* whose first axis is the batch"):
        select_rows([torch.zeros(3)], torch.tensor([0]), 4)
    with pytest.raises(ValueError, match="holds a dict: it must be tensors, or lists and tuples"):
        select_rows([{}], torch.tensor([0]), 4)


def test_wrong_use_is_refused_in_one_line() -> None:
    model = Counted().eval()
    with pytest.raises(ValueError, match="thresholds must be 2 or 3 numbers for a network of 3 exits, got 1"):
        EarlyExit(model, [0.5])
    with pytest.raises(ValueError, match=r"thresholds must be numbers, got \[0.5, nan\]"):
        EarlyExit(model, [0.5, float("nan")])
    with pytest.raises(ValueError, match="Linear can't be run exit by exit, it lacks num_exits, begin, advance"):
        EarlyExit(nn.Linear(2, 2), [0.5])
    with pytest.raises(ValueError, match="max_exit must be between 0 and 2, got 3"):
        EarlyExit(model, [0.5, 0.5]).predict(torch.zeros(1), max_exit=3)
    with pytest.raises(ValueError, match="Counted is in training mode, where rows depend on each other: call eval"):
        EarlyExit(model.train(), [0.5, 0.5]).predict(torch.zeros(1))


def test_exits_are_counted() -> None:
    logits = torch.zeros(4, 3)
    assert num_exits_of(logits) == 1
    assert num_exits_of([logits, logits]) == num_exits_of((logits, logits)) == 2
    model = tower(num_classes=3, input_shape=(5,), exits=4)
    model.blocks[0].eval()
    assert count_exits(model, (5,)) == 4
    assert (model.training, model.blocks[0].training) == (True, False)
    assert count_exits(nn.Linear(5, 3), (5,)) == 1


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([torch.zeros(4, 3)], "returns a list of 1: a network of one exit returns its logits themselves"),
        ({"a": torch.zeros(4, 3)}, "returns dict, not logits"),
        ([torch.zeros(4, 3), torch.zeros(4, 5)], r"return \(4, 3\), \(4, 5\): all must return logits"),
        ([torch.zeros(4, 3), torch.zeros(4, 3), torch.zeros(2, 3)], r"return \(4, 3\), \(4, 3\), \(2, 3\): all"),
        ([torch.zeros(4, 3), torch.zeros(4)], r"return \(4, 3\), \(4,\): all"),
        ([torch.zeros(4), torch.zeros(4)], r"return \(4,\), \(4,\): all"),
        ([torch.zeros(4, 3), None], r"return \(4, 3\), NoneType: all"),
    ],
)
def test_outputs_that_are_not_exits_are_refused_in_one_line(output: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        num_exits_of(output)
    assert "\n" not in str(caught.value)
