"""What a step costs the host beside the network's own work: microseconds and torch operator calls.

On a GPU the host must launch faster than the device computes. The network is so small (digits, MLP, batch 16, one
thread) that a step is the host's work alone. Engine: InfoBatch at ratio 0, with augmentation, seeding, recording
and sums; rows by `stream: device`. Beside it, in turns: forward, loss, backward and SGD of the same network over the
same rows, already normalised. The calls are counted at torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_steps import EngineSteps
from benchmarks.harness import Figure, seconds
from rayprune.config import Config, make_config
from rayprune.engine.train.build import build_network, network_optimizer
from rayprune.engine.train.preflight import input_spec
from rayprune.sources import SampleSource, open_data

BATCH, STEPS, TURNS, COUNTED = 16, 300, 9, 20
CPU = torch.device("cpu")


def figures() -> Iterator[Figure]:
    """Yield µs a step of both, what the engine adds, and the operator calls."""
    torch.set_num_threads(1)
    config = make_config(
        {
            "data": {"source": "digits", "augment": {"crop": 1, "flip": True}},
            "model": {"name": "mlp", "hidden": [16]},
            "train": {"batch_size": BATCH, "epochs": 10},
        }
    )
    source = open_data("digits").train
    engine, plain = EngineSteps(config, source, CPU), _plain(config, source)
    seen: dict[str, list[float]] = {"engine": [], "plain": []}
    for turn in range(TURNS + 1):
        taken = {"engine": seconds(lambda: engine.take(STEPS)), "plain": seconds(lambda: plain(STEPS))}
        if turn:  # the first one is warm-up
            for name, value in taken.items():
                seen[name].append(value / STEPS * 1e6)
    yield Figure(f"MLP step, batch {BATCH}, engine, µs", seen["engine"])
    yield Figure(f"MLP step, batch {BATCH}, forward, backward and SGD alone, µs", seen["plain"])
    yield Figure("what the engine adds, µs a step", [a - b for a, b in zip(*seen.values(), strict=True)])
    yield Figure("operator calls a step, engine", [_calls(engine.take)])
    yield Figure("operator calls a step, forward, backward and SGD alone", [_calls(plain)])


def _plain(config: Config, source: SampleSource) -> Callable[[int], None]:
    spec = input_spec(config, source)
    columns = source.take(np.arange(len(source), dtype=np.int64))
    inputs = spec.augment.evaluate(torch.from_numpy(columns[spec.column]))
    labels = torch.from_numpy(columns["label"])
    network = build_network(config, spec, CPU).train()
    optimizer = network_optimizer(config, network)

    def take(number: int) -> None:
        for step in range(number):
            first = step * BATCH % (len(labels) - BATCH)
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(network(inputs[first : first + BATCH]), labels[first : first + BATCH]).backward()
            optimizer.step()

    return take


class _Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _calls(take: Callable[[int], None]) -> float:
    with _Counted() as counted:
        take(COUNTED)
    return counted.calls / COUNTED
