"""Cost of recording and weighing relative to a ResNet-8 step at batch 128."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.harness import Figure, seconds
from rayprune.core.plan import Plan
from rayprune.core.selection import Selection
from rayprune.engine.scoring.channel import LocalChannel
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey
from rayprune.engine.scoring.recorder import PUSH_ROWS, Recorder
from rayprune.nn.models import build_model
from rayprune.nn.steps import PlainStep

BATCH, STEPS = 128, 60


class _Sink(LocalChannel):
    """Discard pushes; the actor's work on them happens in another process."""

    def call(self, method: str, *args: object) -> list[int]:
        return []

    def post(self, method: str, *args: object) -> None: ...


def _recorder() -> Recorder:
    recorder = Recorder(ScoreClient(_Sink(None)), 0, ("loss",))  # type: ignore[arg-type]
    recorder.start_epoch(AttemptKey(1, 0))
    return recorder


def figures() -> Iterator[Figure]:
    """Yield the step, the recording, the weighing, and their ratio."""
    torch.set_num_threads(2)
    model = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32)).to(memory_format=torch.channels_last)
    step = PlainStep(model, torch.optim.SGD(model.parameters(), lr=0.01))
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    targets, weights = torch.randint(10, (BATCH,)), torch.ones(BATCH)
    plan = Plan.of_selection(Selection.full(PUSH_ROWS), BATCH, 0, 0)
    recorder, push_s = _recorder(), _push_seconds(plan)
    relative, steps, records, weighs = [], [], [], []
    for number in range(STEPS + 5):
        start = time.perf_counter()
        signals = step(images, targets, weights)
        step_s = time.perf_counter() - start
        ids, _, real = plan.rank_rows(0, 1, number, number + 1)
        # One push serves PUSH_ROWS rows; its cost is spread over the steps of those rows.
        start = time.perf_counter()
        recorder.record(ids, real, signals)
        record_s = time.perf_counter() - start + push_s
        weigh_s = _weigh(signals["loss"], weights)
        if number >= 5:
            steps.append(step_s * 1e3)
            records.append(record_s * 1e6)
            weighs.append(weigh_s * 1e6)
            relative.append((record_s + weigh_s) / step_s)
    yield Figure(f"ResNet-8 step, batch {BATCH}, 32×32×3, ms", steps)
    yield Figure("recording one step, share of the push included, µs", records)
    yield Figure("weighing one step (Σ w·l against Σ l), µs", weighs)
    yield Figure("recording + weighing ÷ step", relative, "≤ 0.005")


def _push_seconds(plan: Plan) -> float:
    """Return one step's share of a full push."""
    recorder = _recorder()
    for number in range(plan.num_steps):
        ids, _, real = plan.rank_rows(0, 1, number, number + 1)
        recorder.record(ids, real, {"loss": torch.zeros(BATCH)})
    return seconds(recorder.push) / plan.num_steps


def _weigh(losses: torch.Tensor, weights: torch.Tensor) -> float:
    """Return the extra seconds of the weighted sum over the plain mean, forward and backward, median of 20."""
    costs = []
    for _ in range(20):
        leaf = losses.clone().requires_grad_()
        start = time.perf_counter()
        leaf.mean().backward()
        plain = time.perf_counter() - start
        start = time.perf_counter()
        ((leaf * weights).sum() / BATCH).backward()
        costs.append(time.perf_counter() - start - plain)
    return max(0.0, float(np.median(costs)))
