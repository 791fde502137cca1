"""Networks with several exits in use: how many exits there are, and inference that stops at the first confident one.

The rule is that of MSDNet (Huang et al., ICLR 2018, arXiv 1703.09844): a sample leaves at the first exit whose largest
softmax probability reaches that exit's threshold. Deviation from the published programs, which run the whole network
and choose afterwards: rows that have left are dropped from the state, and nothing runs without rows. The predictions
are those of the whole network in eval mode, up to the rounding of smaller batches.

Shapes: B batch, C classes, K exits, R rows that have not left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.errors import ConfigError
from rayprune.nn.boundary import eval_mode
from rayprune.nn.flops import example_input
from rayprune.nn.models.multi_exit import check_stepwise
from rayprune.nn.signals import max_probability


@torch.no_grad()
def count_exits(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return a network's number of exits, by one forward pass of zeros in eval mode: 1 if it returns one tensor.

    Raises:
        ConfigError: as `num_exits_of`.
    """
    with eval_mode(network):
        return num_exits_of(network(example_input(network, input_shape)))


def num_exits_of(output: Any) -> int:
    """Return the number of exits of a forward pass's output: K, or 1 for one tensor.

    Raises:
        ConfigError: a list of fewer than two, of anything but logits (B, C), or of different shapes.

    >>> num_exits_of(torch.zeros(4, 3)), num_exits_of((torch.zeros(4, 3), torch.zeros(4, 3)))
    (1, 2)
    """
    if isinstance(output, Tensor):
        return 1
    if not isinstance(output, list | tuple):
        raise ConfigError(f"it returns {type(output).__name__}, not logits (B, C) or a list of them")
    if len(output) < 2:
        raise ConfigError(f"it returns a list of {len(output)}: a network of one exit returns its logits themselves")
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in output]
    if len(shapes[0]) != 2 or isinstance(shapes[0], str) or len(set(shapes)) > 1:
        raise ConfigError(
            f"its exits return {', '.join(map(str, shapes))}: all must return logits (B, C) with the same C"
        )
    return len(output)


class EarlyExit:
    """A trained network with exits, and the confidence at which samples leave at each.

    Args:
        model: a `rayprune.nn.models.multi_exit.MultiExitModel`.
        thresholds: of the first K − 1 exits, or of all K; the last exit takes every remaining row whatever its
            threshold is. At −inf every row leaves, at +inf none.

    Raises:
        ConfigError: the model cannot run exit by exit, or the thresholds do not fit it.
    """

    def __init__(self, model: nn.Module, thresholds: Sequence[float]) -> None:
        self.num_exits = check_stepwise(model).num_exits
        self.thresholds = tuple(float(threshold) for threshold in thresholds)
        if len(self.thresholds) not in (self.num_exits - 1, self.num_exits):
            raise ConfigError(
                f"thresholds must be {self.num_exits - 1} or {self.num_exits} numbers for a network of "
                f"{self.num_exits} exits, got {len(self.thresholds)}"
            )
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise ConfigError(
                f"thresholds must be numbers, got {list(self.thresholds)}: use +inf for an exit at which no row leaves"
            )
        self.model = model

    @torch.no_grad()
    def predict(self, inputs: Any, *, max_exit: int | None = None) -> tuple[Tensor, Tensor]:
        """Classify a batch, running each exit only for the rows that have not left before.

        Args:
            inputs: a batch of B rows, as the model's `begin` takes it.
            max_exit: the exit, from 0, at which all remaining rows leave, for a limit in time; None for the last.

        Returns:
            The logits (B, C) of the exit at which each row left, and that exit, (B,) int64.

        Raises:
            ConfigError: the model is in training mode, max_exit is not an exit, or the state cannot be split into rows.
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
        predictions = torch.empty_like(logits)
        exits = torch.full((len(logits),), last, device=logits.device)
        rows = torch.arange(len(logits), device=logits.device)
        for exit in range(last):
            leaving = max_probability(logits) >= self.thresholds[exit]
            predictions[rows[leaving]] = logits[leaving]
            exits[rows[leaving]] = exit
            remaining = (~leaving).nonzero().squeeze(1)
            if not len(remaining):
                return predictions, exits
            if len(remaining) < len(rows):
                state = select_rows(state, remaining, len(rows))
                rows = rows[remaining]
            logits, state = model.advance(exit + 1, state)
        predictions[rows] = logits
        return predictions, exits


def select_rows(state: Any, rows: Tensor, batch_size: int) -> Any:
    """Return a state of fewer rows.

    Args:
        state: a tensor whose first axis is the batch, or nested lists and tuples of such tensors.
        rows: (R,) int64, the rows to keep.
        batch_size: B of the state.

    Raises:
        ConfigError: the state holds anything else, or a tensor whose first axis is not the batch.

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
