"""Cost of DynaMS: a step that also trains the proxy ÷ a plain step, and folding and selecting by distances.

The steps (ResNet-8, batch 128, 32×32×3, two threads) alternate. The name of each ratio gives 1 + φ, the ratio of
multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.harness import Figure, alternate, ratios, seconds
from rayprune import DynaMS, Selector
from rayprune.nn.models import build_model
from rayprune.nn.steps import PlainStep, PspStep

BATCH, STEPS, WARM_UP = 128, 30, 5
WIDTHS = (0.25, 0.5)
NUM_SAMPLES, NUM_CLASSES, PUSH_ROWS, REPETITIONS = 1_000_000, 1_000, 262_144, 5


def figures() -> Iterator[Figure]:
    """Yield the steps, their ratios, and the seconds to fold a sweep and to select."""
    torch.set_num_threads(2)
    yield from _steps()
    folds, selections = zip(*(_fold_and_select(seed) for seed in range(REPETITIONS + 1)), strict=True)
    size = f"{NUM_SAMPLES:,} samples, {NUM_CLASSES:,} classes"
    yield Figure(f"DynaMS, folding a sweep, {size}, s", list(folds[1:]))
    yield Figure(f"DynaMS, selecting by even quotas, {size}, s", list(selections[1:]))


def _steps() -> Iterator[Figure]:
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    targets_B, weights_B = torch.randint(10, (BATCH,)), torch.ones(BATCH)
    plain = PlainStep(network := _network(), torch.optim.SGD(network.parameters(), lr=0.01))
    steps: dict[str, PlainStep] = {"plain": plain}
    for width in WIDTHS:
        pair = PspStep.module_of(network := _network(), (3, 32, 32), width=width)
        steps[f"width {width}"] = PspStep(pair, torch.optim.SGD(network.parameters(), lr=0.01), width=width)
    measures = {
        name: lambda step=step: seconds(lambda: step(images, targets_B, weights_B)) for name, step in steps.items()
    }
    times = alternate(measures, STEPS, WARM_UP)
    plain_s = times.pop("plain")
    yield Figure(f"ResNet-8 step, batch {BATCH}, ms", [s * 1e3 for s in plain_s])
    for name, values in times.items():
        yield Figure(f"PSP step, {name}, ms", [s * 1e3 for s in values])
        yield Figure(f"PSP step ÷ plain, {name} (1 + φ = {steps[name].train_cost:.3f})", ratios(values, plain_s))


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32))
    return model.to(memory_format=torch.channels_last)


def _fold_and_select(seed: int) -> tuple[float, float]:
    """Return the seconds to fold a sweep over all samples, push by push, and to select the nearest of each class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(NUM_CLASSES, size=NUM_SAMPLES)
    selector = Selector(DynaMS(block_epochs=1), NUM_SAMPLES, 20, seed, labels)
    selection = selector.begin_epoch(0)
    assert selection.num_scored == NUM_SAMPLES
    distances = rng.exponential(size=NUM_SAMPLES).astype(np.float32)
    order = rng.permutation(NUM_SAMPLES)
    pushes = [np.sort(order[start : start + PUSH_ROWS]) for start in range(0, NUM_SAMPLES, PUSH_ROWS)]
    signals = [{"boundary": distances[ids]} for ids in pushes]
    fold = 0.0
    for ids, signal in zip(pushes, signals, strict=True):
        fold += seconds(lambda ids=ids, signal=signal: selector.observe(ids, signal, 0, sweep=True))
    select = seconds(lambda: selector.begin_epoch(1))
    assert selector.begin_epoch(1).num_kept < NUM_SAMPLES
    return fold, select
