"""How long a network takes to each of its exits, measured: multiply-adds are not seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rayprune.nn.models.multi_exit import MultiExitModel

_WARM_UP, _LEAST, _MOST = 3, 5, 50  # rounds
_LONGEST_S = 10.0  # for all rounds of one batch size


@dataclass(frozen=True)
class Latency:
    """Repeated forwards of one batch up to one exit.

    Attributes:
        exit: from 1.
        batch: rows a forward.
        repeats: how many were timed.
        median_s: of the repeats.
        low_s, high_s: their quartiles.
    """

    exit: int
    batch: int
    repeats: int
    median_s: float
    low_s: float
    high_s: float


def lazy(network: nn.Module) -> bool:
    """Tell whether a network can be computed exit by exit: see `rayprune.nn.models.multi_exit`."""
    return isinstance(network, MultiExitModel)


@torch.inference_mode()
def measure_latency(
    network: nn.Module, input_shape: tuple[int, ...], num_exits: int, device: torch.device, batch: int
) -> list[Latency]:
    """Time forwards of made-up inputs up to each exit, in turns, so that a drift of the clock touches all alike.

    A network that is not lazy can't stop early: each of its exits takes the whole forward.

    Args:
        network: in eval mode on the device.
        input_shape: of one sample.
        num_exits: K.
        device: where it computes.
        batch: rows a forward.

    Returns:
        One an exit.
    """
    inputs = torch.rand(batch, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    if inputs.ndim == 4:
        inputs = inputs.to(memory_format=torch.channels_last)  # as evaluated batches come
    forwards: list[Callable[[Tensor], object]] = [network]
    if isinstance(network, MultiExitModel):
        forwards = [_up_to(network, exit_) for exit_ in range(num_exits)]
    seconds: list[list[float]] = [[] for _ in forwards]
    begun = time.perf_counter()
    for number in range(_WARM_UP + _MOST):
        for forward, timed in zip(forwards, seconds, strict=True):
            timed.append(_timed(forward, inputs, device))
        if number + 1 >= _WARM_UP + _LEAST and time.perf_counter() - begun > _LONGEST_S:
            break
    found = seconds if len(seconds) == num_exits else seconds * num_exits
    return [_summary(exit_, batch, timed[_WARM_UP:]) for exit_, timed in enumerate(found, start=1)]


def _up_to(network: MultiExitModel, last: int) -> Callable[[Tensor], object]:
    def forward(inputs: Tensor) -> Tensor:
        state = network.begin(inputs)
        for exit_ in range(last + 1):
            logits, state = network.advance(exit_, state)
        return logits

    return forward


def _timed(forward: Callable[[Tensor], object], inputs: Tensor, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    forward(inputs)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(exit_: int, batch: int, seconds: list[float]) -> Latency:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Latency(exit_, batch, len(seconds), median, low, high)
