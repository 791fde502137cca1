"""Networks with several exits: what they return, and what they offer to stop early.

A network is multi-exit when its forward returns a list or a tuple of K ≥ 2 logit tensors (B, C), the earliest exit
first. That suffices to train and to evaluate it, so that any `nn.Module` may be one without importing this module. To
stop early it also has `num_exits`, `begin` and `advance`, of `MultiExitModel`; `MultiExit` builds the forward from
them.

A state holds what later exits still need: a tensor, or lists and tuples, nested as they may be, of tensors whose first
axis is the batch, so that rows which have left can be dropped between exits.

Shapes: B batch, C classes, K exits.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

CURE = "a network with exits returns a list of at least 2 logit tensors (batch, classes), the earliest exit first"


@runtime_checkable
class MultiExitModel(Protocol):
    """What an exit-by-exit evaluation calls; exits count from 0."""

    num_exits: int

    def begin(self, inputs: Any) -> Any:
        """Give the state before exit 0 of a batch of inputs."""
        ...

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Give the logits (B, C) at `exit`, and the state that exit + 1 starts from."""
        ...


class MultiExit(nn.Module):
    """A network whose forward is its `begin` and all its `advance`s.

    Args:
        num_exits: K, at least 2.
    """

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        if num_exits < 2:
            raise ValueError(f"a network with exits has at least 2, not {num_exits}: give it more blocks")
        self.num_exits = num_exits

    def begin(self, inputs: Tensor) -> Any:
        """Give the state before exit 0: the inputs themselves, unless a subclass says otherwise."""
        return inputs

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Give the logits (B, C) at `exit`, and the state that exit + 1 starts from."""
        raise TypeError(f"{type(self).__name__} must define advance(exit, state) -> (logits, state)")

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Give the logits (B, C) of all exits, the earliest first."""
        state = self.begin(inputs)
        exits = []
        for exit in range(self.num_exits):
            logits, state = self.advance(exit, state)
            exits.append(logits)
        return exits


def is_multi_exit(output: object) -> bool:
    """Tell whether a network's output is one of exits: a plain list or tuple, not a named tuple of other things.

    >>> is_multi_exit([1, 2]), is_multi_exit(1)
    (True, False)
    """
    return isinstance(output, list | tuple) and not hasattr(output, "_fields")


def as_exits(output: object, num_classes: int | None = None) -> list[Tensor]:
    """Check what a network with exits returned.

    Args:
        output: what its forward gave.
        num_classes: C, where it is known.

    Returns:
        The logits of the K exits, each (B, C), the earliest first.

    Raises:
        ValueError: fewer than 2 exits, something that is no tensor (batch, classes), exits of different batches or
            numbers of classes, or other than num_classes.

    >>> import torch
    >>> [tuple(logits.shape) for logits in as_exits((torch.zeros(4, 3), torch.zeros(4, 3)))]
    [(4, 3), (4, 3)]
    >>> as_exits([torch.zeros(4, 3), torch.zeros(4, 5)])
    Traceback (most recent call last):
    ValueError: the exits' logits differ in shape, (4, 3) and (4, 5): every exit must score the same batch and classes
    """
    if isinstance(output, Tensor):
        raise ValueError(f"the model returns one tensor {tuple(output.shape)}: {CURE}")
    if not isinstance(output, list | tuple) or not is_multi_exit(output):
        raise ValueError(f"the model returns a {type(output).__name__}: {CURE}")
    if len(output) < 2:
        raise ValueError(f"the model returns a list of {len(output)}: {CURE}")
    exits: list[Tensor] = []
    for exit, logits in enumerate(output):
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            found = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise ValueError(f"exit {exit} of the model gives {found}: {CURE}")
        exits.append(logits)
    shapes = [tuple(logits.shape) for logits in exits]
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise ValueError(
            f"the exits' logits differ in shape, {shapes[0]} and {other}: "
            "every exit must score the same batch and classes"
        )
    if num_classes is not None and shapes[0][1] != num_classes:
        raise ValueError(
            f"the exits score {shapes[0][1]} classes, the data have {num_classes}: build the model for them"
        )
    return exits
