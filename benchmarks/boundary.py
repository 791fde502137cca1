"""Cost of the distance to the nearest decision boundary relative to a ResNet-8 step, for 10 and 1,000 classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Figure, alternate, ratios, repeat, seconds
from rayprune.nn.boundary import last_linear, pair_distances
from rayprune.nn.models import build_model
from rayprune.nn.signals import compute_signals
from rayprune.nn.steps import PlainStep

BATCH, STEPS = 128, 60
GOALS = {10: "≤ 0.03", 1000: "≤ 0.05"}


def figures() -> Iterator[Figure]:
    """Yield the step, the signal with a precomputed table, their ratio, and the table, for each number of classes."""
    torch.set_num_threads(2)
    for num_classes, goal in GOALS.items():
        yield from _figures(num_classes, goal)


def _figures(num_classes: int, goal: str) -> Iterator[Figure]:
    model = build_model("resnet8", num_classes=num_classes, input_shape=(3, 32, 32))
    model = model.to(memory_format=torch.channels_last)
    step = PlainStep(model, torch.optim.SGD(model.parameters(), lr=0.01))
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    targets_B, weights_B, losses_B = torch.randint(num_classes, (BATCH,)), torch.ones(BATCH), torch.zeros(BATCH)
    weight = model.get_submodule(last_linear(model, images[:2])).weight
    table_CC = pair_distances(weight)
    with torch.no_grad():
        logits_BC = model(images)

    def signal() -> None:
        compute_signals(("boundary",), logits_BC, targets_B, losses_B, distances_CC=table_CC)

    measures = {
        "step": lambda: seconds(lambda: step(images, targets_B, weights_B)),
        "signal": lambda: seconds(signal),
    }
    times = alternate(measures, STEPS, warm_up=5)
    name = f"{num_classes:,} classes"
    tables = repeat(lambda: pair_distances(weight), 15, warm_up=2)
    yield Figure(f"ResNet-8 step, batch {BATCH}, 32×32×3, {name}, ms", [s * 1e3 for s in times["step"]])
    yield Figure(f"nearest boundary, {name}, precomputed table, µs", [s * 1e6 for s in times["signal"]])
    yield Figure(f"nearest boundary ÷ step, {name}", ratios(times["signal"], times["step"]), goal)
    yield Figure(f"table of distances, {name}, once per sweep, ms", [s * 1e3 for s in tables])
