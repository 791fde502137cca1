"""Lazy inference: a network with exits answers as soon as it is sure, and computes nothing behind.

The rule is that of MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844): a sample leaves at the first exit whose largest
softmax probability reaches that exit's threshold. Deviation from the published programs, which run the whole network
and choose afterwards: rows that have left are dropped from the state, and without rows nothing runs. The answers are
those of the whole network in evaluation mode, up to the rounding that smaller batches bring.

Shapes: B batch, C classes, K exits, R rows that have not left.

Networks with several exits: their forward returns a list (or tuple) of K ≥ 2 logits, the earliest exit first.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.errors import ConfigError
from rayprune.nn.boundary import eval_mode
from rayprune.nn.flops import check_stepwise
from rayprune.nn.models.multi_exit import MultiExitModel


def num_exits_of(output: Any) -> int:
    """Return how many exits a forward's output is of: K, or 1 for one tensor.

    Raises:
        ConfigError: one line: a list of less than two, of something else than (B, C) logits, or of different shapes.
    """
    if isinstance(output, Tensor):
        return 1
    if not isinstance(output, list | tuple):
        raise ConfigError(f"it returns {type(output).__name__}, not logits (B, C) or a list of them")
    if len(output) < 2:
        raise ConfigError(f"it returns a list of {len(output)}: a network of one exit returns its logits themselves")
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in output]
    if len(shapes[0]) != 2 or isinstance(shapes[0], str) or len(set(shapes)) > 1:
        raise ConfigError(f"its exits return {', '.join(map(str, shapes))}: all must return logits (B, C) of one C")
    return len(output)


@torch.no_grad()
def count_exits(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return a network's number of exits, by one forward of zeros in eval mode: 1 where it returns one tensor.

    Raises:
        ConfigError: as `num_exits_of`.
    """
    parameter = next(network.parameters())
    example = torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with eval_mode(network):
        return num_exits_of(network(example))


class EarlyExit:
    """A trained network with exits and the confidence at which each lets a sample go.

    Args:
        model: with `num_exits`, `begin` and `advance` of `rayprune.nn.models.multi_exit`.
        thresholds: of the first K − 1 exits, or of all K; the last exit takes every row whatever its threshold is.
            −inf lets everything out, +inf nothing.

    Raises:
        ConfigError: the model can't be run exit by exit, or the thresholds are not its own.
    """

    def __init__(self, model: nn.Module, thresholds: Sequence[float]) -> None:
        check_stepwise(model)
        assert isinstance(model, MultiExitModel)
        self.num_exits = model.num_exits
        self.thresholds = tuple(float(threshold) for threshold in thresholds)
        if len(self.thresholds) not in (self.num_exits - 1, self.num_exits):
            raise ConfigError(
                f"thresholds must be {self.num_exits - 1} or {self.num_exits} numbers for a network of "
                f"{self.num_exits} exits, got {len(self.thresholds)}"
            )
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise ConfigError(f"thresholds must be numbers, got {list(self.thresholds)}: +inf lets nothing out")
        self.model = model

    @torch.no_grad()
    def predict(self, inputs: Any, *, max_exit: int | None = None) -> tuple[Tensor, Tensor]:
        """Classify a batch, running each exit for the rows that no earlier one was sure of.

        Args:
            inputs: a batch of B rows, as the model's `begin` takes it.
            max_exit: the exit, from 0, at which every row left must answer: what time allows. None for the last.

        Returns:
            The logits (B, C) of the exit that each row left at, and that exit, (B,) int64.

        Raises:
            ConfigError: the model is in training mode, max_exit is no exit, or the state can't be split into rows.
        """
        last = self.num_exits - 1 if max_exit is None else max_exit
        if not 0 <= last < self.num_exits:
            raise ConfigError(f"max_exit must be between 0 and {self.num_exits - 1}, got {max_exit}")
        if self.model.training:
            raise ConfigError(
                f"{type(self.model).__name__} is in training mode, where rows depend on each other: call eval()"
            )
        model: Any = self.model
        logits, state = model.advance(0, model.begin(inputs))
        answers = torch.empty_like(logits)
        exits = torch.full((len(logits),), last, device=logits.device)
        rows = torch.arange(len(logits), device=logits.device)
        for exit in range(last):
            leaves = confidence(logits) >= self.thresholds[exit]
            answers[rows[leaves]] = logits[leaves]
            exits[rows[leaves]] = exit
            stays = (~leaves).nonzero().squeeze(1)
            if not len(stays):
                return answers, exits
            if len(stays) < len(rows):
                state = select_rows(state, stays, len(rows))
                rows = rows[stays]
            logits, state = model.advance(exit + 1, state)
        answers[rows] = logits
        return answers, exits


def confidence(logits: Tensor) -> Tensor:
    """Give the largest softmax probability of logits (B, C) as (B,), in float32 or the logits' wider type.

    >>> confidence(torch.tensor([[0.0, 0.0], [0.0, 100.0]]))
    tensor([0.5000, 1.0000])
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.softmax(dim=1).amax(dim=1)


def select_rows(state: Any, rows: Tensor, batch_size: int) -> Any:
    """Give a state of fewer rows.

    Args:
        state: a tensor, or lists and tuples of tensors, nested as they may be, whose first axis is the batch.
        rows: (R,) int64, the rows to keep.
        batch_size: B of the state.

    Raises:
        ConfigError: something else in the state, or a tensor whose first axis is not the batch.

    >>> select_rows([torch.arange(3), (torch.eye(3)[:, :1],)], torch.tensor([2]), 3)
    [tensor([2]), (tensor([[0.]]),)]
    """
    if isinstance(state, Tensor):
        if state.ndim == 0 or len(state) != batch_size:
            raise ConfigError(
                f"the state between exits holds a tensor {tuple(state.shape)} for a batch of {batch_size}: rows that "
                "leave can only be dropped from tensors whose first axis is the batch"
            )
        return state.index_select(0, rows)
    if isinstance(state, list | tuple):
        selected = [select_rows(part, rows, batch_size) for part in state]
        if isinstance(state, list):
            return selected
        return type(state)(*selected) if hasattr(state, "_fields") else tuple(selected)
    raise ConfigError(
        f"the state between exits holds a {type(state).__name__}: it must be tensors, or lists and tuples of tensors"
    )
