"""Lazy inference: the exits the whole network would have chosen, and nothing computed for rows that have left.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rayprune.nn.early_exit import EarlyExit, confidence, select_rows
from rayprune.nn.flops import exit_macs
from rayprune.nn.models import build_model
from rayprune.nn.models.multi_exit import MultiExit

INF = float("inf")
SHAPE = (3, 16, 16)
SMALL = {
    "msdnet": {"num_blocks": 4, "channels": 4, "growth_rate": 2},
    "ranet": {"channels": 4, "growth_rate": 4, "step": 1},
}
Pair = namedtuple("Pair", ["left", "right"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def trained(name: str) -> Any:
    """Return a network in evaluation mode whose norms have seen some images."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=5, input_shape=SHAPE, **SMALL[name]).double()
    for _ in range(3):
        model(torch.randn(16, *SHAPE, dtype=torch.float64))
    return model.eval()


def chosen(model: nn.Module, images: Tensor, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Choose from the whole forward, a row at a time."""
    with torch.no_grad():
        whole = model(images)
    exits = []
    for row in range(len(images)):
        sure = [k for k, logits in enumerate(whole) if logits[row].softmax(0).max() >= thresholds[k]]
        exits.append(min([*sure, len(whole) - 1]))
    return torch.stack([whole[k][row] for row, k in enumerate(exits)]), torch.tensor(exits)


def spread(model: nn.Module, images: Tensor) -> list[float]:
    """Return thresholds that let some rows out at every exit."""
    with torch.no_grad():
        return [confidence(logits).quantile(0.8).item() for logits in model(images)[:-1]] + [-INF]


@pytest.mark.parametrize("name", SMALL)
def test_the_answers_are_those_of_the_whole_network(name: str) -> None:
    model, images = trained(name), torch.randn(40, *SHAPE, dtype=torch.float64)
    thresholds = spread(model, images)
    logits, exits = chosen(model, images, thresholds)
    assert len(exits.unique()) == model.num_exits
    found, left_at = EarlyExit(model, thresholds).predict(images)
    assert left_at.dtype == torch.int64
    assert torch.equal(left_at, exits)
    torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-9)
    assert not found.requires_grad
    for row in range(6):
        alone, exit = EarlyExit(model, thresholds[:-1]).predict(images[row : row + 1])
        assert exit.tolist() == [exits[row]]
        torch.testing.assert_close(alone, logits[row : row + 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_only_rows_that_have_not_left_are_computed(name: str) -> None:
    """What all modules really computed is what the rows' exits cost."""
    model, images = trained(name), torch.randn(24, *SHAPE, dtype=torch.float64)
    early = EarlyExit(model, spread(model, images))
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
    """Logits [x, 0] at every one of 3 exits, and the size of the batch each was called with."""

    def __init__(self) -> None:
        super().__init__(3)
        self.sizes: list[tuple[int, int]] = []

    def advance(self, exit: int, state: Tensor) -> tuple[Tensor, Tensor]:
        self.sizes.append((exit, len(state)))
        return torch.stack([state, torch.zeros_like(state)], dim=1), state + 1


def test_nothing_runs_once_no_row_is_left() -> None:
    model = Counted().eval()
    sure = confidence(torch.tensor([[1.0, 0.0]])).item()
    logits, exits = EarlyExit(model, [sure, sure, -INF]).predict(torch.tensor([2.0, 0.0, 1.0]))
    assert exits.tolist() == [0, 1, 0]  # a confidence equal to the threshold leaves
    assert logits[:, 0].tolist() == [2.0, 1.0, 1.0]
    assert model.sizes == [(0, 3), (1, 1)]
    model.sizes.clear()
    assert EarlyExit(model, [INF, INF]).predict(torch.zeros(2))[1].tolist() == [2, 2]
    assert model.sizes == [(0, 2), (1, 2), (2, 2)]
    model.sizes.clear()
    assert EarlyExit(model, [INF, INF]).predict(torch.zeros(2), max_exit=0)[1].tolist() == [0, 0]
    assert model.sizes == [(0, 2)]
    assert EarlyExit(model, [-INF, INF]).predict(torch.zeros(2))[1].tolist() == [0, 0]


def test_rows_that_are_no_number_go_to_the_last_exit() -> None:
    logits, exits = EarlyExit(Counted().eval(), [0.5, 0.5]).predict(torch.tensor([float("nan"), 3.0]))
    assert exits.tolist() == [2, 0]
    assert logits[0].isnan().any()


def test_half_precision_confidences_are_computed_in_float32() -> None:
    logits = torch.tensor([[9.0, 0.0]], dtype=torch.bfloat16)
    assert confidence(logits).dtype == torch.float32
    assert confidence(logits).item() == pytest.approx(0.999877, abs=1e-6)


def test_states_of_lists_and_tuples_lose_rows() -> None:
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
