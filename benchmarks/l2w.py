"""Cost of learned sample weights for MSDNet-5 on CIFAR-10: one L2W batch compared with two plain half batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.harness import Figure, alternate, ratios, seconds
from rayprune.nn.models import build_model
from rayprune.nn.steps import ExitStep, L2wStep, PlainStep

BATCH, REPEATS, INTERVAL = 64, 9, 100


def figures() -> Iterator[Figure]:
    """Yield the plain batch, and the cost of learning weights in every batch and in every hundredth batch."""
    torch.set_num_threads(2)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    targets_B, weights_B = torch.randint(10, (BATCH,)), torch.ones(BATCH)
    plain, learned = _step(ExitStep), _step(L2wStep)
    halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]

    def two_halves() -> None:
        for half in halves:
            plain(images[half], targets_B[half], weights_B[half])

    measures = {
        "plain": lambda: seconds(two_halves),
        "meta": lambda: seconds(lambda: learned(images, targets_B, weights_B, learns=True)),
        "between": lambda: seconds(lambda: learned(images, targets_B, weights_B, learns=False)),
    }
    times = alternate(measures, REPEATS, warm_up=2)
    pairs = zip(times["meta"], times["between"], strict=True)
    seldom = [(meta + (INTERVAL - 1) * between) / INTERVAL for meta, between in pairs]
    yield Figure(f"MSDNet-5, two plain steps of {BATCH // 2} images, ms", [s * 1e3 for s in times["plain"]])
    yield Figure("learned weights, meta interval 1 ÷ plain", ratios(times["meta"], times["plain"]), "≤ 4.5")
    yield Figure(f"learned weights, meta interval {INTERVAL} ÷ plain", ratios(seldom, times["plain"]), "≤ 1.1")


def _step(step: type[PlainStep]) -> Any:
    torch.manual_seed(0)
    model = build_model("msdnet", num_classes=10, input_shape=(3, 32, 32), num_blocks=5)
    model = model.to(memory_format=torch.channels_last)
    return step(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), num_exits=5)  # type: ignore[call-arg]
