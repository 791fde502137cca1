"""Host overhead of a training step: microseconds and torch operator calls.

On a GPU the host must launch work faster than the device computes it. The network is so small (digits, MLP, batch 16,
one thread) that a step is host work only. The engine runs InfoBatch at ratio 0 with augmentation, seeding, recording,
metric sums, and `stream: device`. It alternates with forward, loss, backward and SGD of the same network over the same,
already normalized rows. Operator calls are counted at torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_steps import EngineSteps
from benchmarks.harness import Figure, alternate, seconds
from rayprune.config import Config, make_config
from rayprune.engine.train.build import build_network, network_optimizer
from rayprune.engine.train.preflight import input_spec
from rayprune.sources import SampleSource, open_data

BATCH, STEPS, ROUNDS, COUNTED_STEPS = 16, 300, 9, 20
CPU = torch.device("cpu")


def figures() -> Iterator[Figure]:
    """Yield µs per step of both, the engine's overhead, and the operator calls."""
    torch.set_num_threads(1)
    config = make_config(
        {
            "data": {"source": "digits", "augment": {"crop": 1, "flip": True}},
            "model": {"name": "mlp", "hidden": [16]},
            "train": {"batch_size": BATCH, "epochs": 10},
        }
    )
    source = open_data("digits").train
    loops = {"engine": EngineSteps(config, source, CPU).take, "plain": _plain_steps(config, source)}
    measures = {name: lambda take=take: seconds(lambda: take(STEPS)) / STEPS * 1e6 for name, take in loops.items()}
    times = alternate(measures, ROUNDS)
    yield Figure(f"MLP step, batch {BATCH}, engine, µs", times["engine"])
    yield Figure(f"MLP step, batch {BATCH}, forward, backward and SGD alone, µs", times["plain"])
    yield Figure("engine overhead, µs per step", [a - b for a, b in zip(*times.values(), strict=True)])
    yield Figure("operator calls per step, engine", [_calls_per_step(loops["engine"])])
    yield Figure("operator calls per step, forward, backward and SGD alone", [_calls_per_step(loops["plain"])])


def _plain_steps(config: Config, source: SampleSource) -> Callable[[int], None]:
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


class _CallCounter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _calls_per_step(take: Callable[[int], None]) -> float:
    with _CallCounter() as counter:
        take(COUNTED_STEPS)
    return counter.calls / COUNTED_STEPS
