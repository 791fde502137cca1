"""Training steps as in rayprune.engine.train.worker, in this process and without files, for profiling.

Shapes: B rows of a batch, N samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from rayprune.config import Config
from rayprune.engine.data.batch import Batch
from rayprune.engine.data.device import DevicePlacer, DeviceStream
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.train.build import StepSettings, build_network, build_step, network_optimizer, pick_precision
from rayprune.engine.train.metrics import MetricSums
from rayprune.engine.train.preflight import input_spec
from rayprune.methods import InfoBatch
from rayprune.nn.augment import seed_generators, step_seed
from rayprune.sources import SampleSource

_EPOCHS = 1_000_000


class EngineSteps:
    """Steps of InfoBatch at ratio 0 with `stream: device`; every loss is recorded and epochs never run out."""

    def __init__(self, config: Config, source: SampleSource, device: torch.device) -> None:
        self._spec, self._seed = input_spec(config, source), config.train.seed
        batch_size, row_bytes = config.train.batch_size, source.schema.row_bytes
        network, method = build_network(config, self._spec, device), InfoBatch(prune_ratio=0.0)
        self._step = build_step(config, network, self._spec, StepSettings.of(method, config), device=device)
        spec = ScoreSpec(method.to_config(), source, 0, _EPOCHS, 0, batch_size, "pad", row_bytes, None, 0)
        self._via = DeviceStream({"train": source}, device)
        self._place, self._sums = DevicePlacer(self._spec.column, device), MetricSums(device)
        self._session = ScoringSession(ScoreClient.in_process(spec), 1, 0, 1, ("loss",))
        self._batches = self._all_batches()
        self._number, self._device = 0, device

    def _all_batches(self) -> Iterator[tuple[int, Batch]]:
        for epoch in range(_EPOCHS):
            self._session.start_epoch(epoch)
            header = self._session.announce()
            for batch in self._session.batches(header, self._via.batches):
                yield epoch, batch
            self._session.barrier("close", header.num_steps, with_state=False)

    def take(self, number: int, *, record: bool = True) -> None:
        """Take `number` steps; without `record` their losses are discarded."""
        for _ in range(number):
            epoch, batch = next(self._batches)
            self._number += 1
            seed_generators(step_seed(self._seed, epoch, self._number, 0), self._device)
            augment, shape = self._spec.augment, self._spec.shape
            placed = self._place(batch, augment.draws(batch.ids, shape, seed=self._seed, epoch=epoch))
            inputs = augment.train(placed.inputs, placed.draws)
            signals = self._step(inputs, placed.targets, placed.rows.weights)
            if record:
                self._session.recorder.record(batch.ids, batch.real, signals)
            self._sums.add(signals, placed.rows, batch.real, batch.num_bytes)


def plain_epochs(config: Config, source: SampleSource, device: torch.device) -> Iterator[float]:
    """Yield the samples per second of each epoch of a hand-written loop: data on the device, no selection.

    Network, optimizer, augmentation, batch size and precision are the engine's. An incomplete last batch is dropped.
    """
    spec, batch = input_spec(config, source), config.train.batch_size
    columns = source.take(np.arange(len(source), dtype=np.int64))
    images, labels = (torch.from_numpy(columns[name]).to(device) for name in (spec.column, "label"))
    model = build_network(config, spec, device).train()
    if config.train.compile:
        model.compile()
    optimizer, precision = network_optimizer(config, model), pick_precision(config.train.precision, device)
    for epoch in range(_EPOCHS):
        start = time.perf_counter()
        order = torch.randperm(len(labels))
        draws = spec.augment.draws(order.numpy(), spec.shape, seed=0, epoch=epoch)
        placed, order = None if draws is None else torch.from_numpy(draws).to(device), order.to(device)
        for first in range(0, len(order) - batch + 1, batch):
            ids = order[first : first + batch]
            inputs = spec.augment.train(images[ids], None if placed is None else placed[first : first + batch])
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                logits = model(inputs)
            functional.cross_entropy(logits.float(), labels[ids]).backward()
            optimizer.step()
        wait(device)
        yield len(order) // batch * batch / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(device: torch.device, action: Callable[[], object]) -> float:
    """Return the milliseconds that an action takes on the device, by CUDA events; by the clock without a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return (time.perf_counter() - start) * 1e3
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    action()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


def idle_share(device: torch.device, action: Callable[[], object]) -> float:
    """Return the share of an action's time in which the device runs neither kernels nor copies."""
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        action()
        wait(device)
        wall_us = (time.perf_counter() - start) * 1e6
    ranges = (event.time_range for event in profiler.events() if event.device_type == kind)
    return max(0.0, 1.0 - union_length((one.start, one.end) for one in ranges) / wall_us)


def union_length(ranges: Iterable[tuple[float, float]]) -> float:
    """Return the total length of the union of intervals.

    >>> union_length([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0)])
    4.0
    """
    total, end = 0.0, float("-inf")
    for first, last in sorted(ranges):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
