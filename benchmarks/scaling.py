"""Samples per second with one and two workers, and a projection to 64 GPUs and 1e9 samples.

Measured: ResNet-8 on random 32×32×3 images, one thread per worker, global batch 128, recording on. Two workers share
this machine's cores, so on two cores their ratio is at most 2.

Projected ("on paper"), for N samples of which a share k is kept, trained at R samples per second on each of G GPUs:

    training = k·N ÷ (G·R)
    during   = k·N ÷ i + k·N·c        actor work while the GPUs train
    between  = N·(p + s) + G·f + b    work that all GPUs wait for

where i is the intake in observations per second (calls of 262,144); c, p and s are the seconds per sample to slice the
plan by rank, to lay it out, and to select (measured at 1e7 samples; the benchmark `plan` measures 1e8); f is the time
of an empty call (each rank flushes once); and b is the time of checkpoint and report (of this small model; a large
model's checkpoint comes on top, as in any run). The actor has one thread, so it becomes the bottleneck when during ÷
training reaches 1. N, G, R and k are assumptions. `stream: local` slices by rank; `stream: ray` hands out the same ids
once, as read tasks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.actor import intake
from benchmarks.harness import Figure, ratios, seconds
from benchmarks.images import random_images
from rayprune import InfoBatch, Plan, Selection, Selector
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train

ROWS, BATCH, EPOCHS = 8_192, 128, 4
PAPER_SAMPLES, PAPER_GPUS, PAPER_RATE, PAPER_KEPT = 1e9, 64, 2_500.0, 0.7
PLAN_SAMPLES, PAPER_BATCH = 10_000_000, 16_384
PUSH_ROWS, REPETITIONS = 262_144, 3


def figures() -> Iterator[Figure]:
    """Yield samples per second, their ratio, the constants, and the projection."""
    start_ray()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images, labels = random_images(ROWS)
        np.save(folder / "x_train.npy", images)
        np.save(folder / "y_train.npy", labels)
        rates, reports = {}, {}
        for workers in (1, 2):
            lines = _lines(folder, workers)
            rates[workers] = [ROWS / line["seconds"]["epoch"] for line in lines]
            reports[workers] = [line["seconds"]["checkpoint"] for line in lines]
            yield Figure(f"ResNet-8, {workers} worker(s), one thread each, samples/s", rates[workers])
        yield Figure("2 workers ÷ 1 worker", ratios(rates[2], rates[1]))
        (folder / "intake").mkdir()
        intakes, latencies = intake(folder / "intake", PUSH_ROWS)
    plans, selects, slices = _seconds_per_sample()
    yield Figure(f"i: intake in calls of {PUSH_ROWS:,}, million samples/s", intakes)
    yield Figure("p: plan, ns per sample", [value * 1e9 for value in plans])
    yield Figure("s: selection, ns per sample", [value * 1e9 for value in selects])
    yield Figure("c: slicing by rank, ns per kept sample", [value * 1e9 for value in slices])
    yield Figure("f: empty call of the actor, ms", [value * 1e3 for value in latencies])
    yield Figure("b: checkpoint and report, ms", [value * 1e3 for value in reports[2]])
    medians = {
        "intake_m": np.median(intakes),
        "plan_s": np.median(plans),
        "select_s": np.median(selects),
        "slice_s": np.median(slices),
        "call_s": np.median(latencies),
        "report_s": np.median(reports[2]),
    }
    yield from _project(**medians)


def _lines(folder: Path, workers: int) -> list[dict[str, Any]]:
    config = make_config(
        {
            "data": {"source": "arrays", "path": str(folder), "validation_fraction": 0},
            "model": {"name": "resnet8"},
            "method": {"name": "infobatch", "prune_ratio": 0.0},
            "train": {"epochs": EPOCHS, "batch_size": BATCH},
            "scaling": {"num_workers": workers, "threads": 1, "cpus_per_worker": 0.5, "use_gpu": False},
            "run": {"storage_path": str(folder), "name": f"workers-{workers}"},
        }
    )
    return train(config).metrics[1:]


def _seconds_per_sample() -> tuple[list[float], list[float], list[float]]:
    """Return the seconds per sample to lay out a plan and to select, and per kept sample to slice the plan by rank."""
    full = Selection.full(PLAN_SAMPLES)
    plans, selects, slices = [], [], []
    selector, ranks = Selector(InfoBatch(), PLAN_SAMPLES, REPETITIONS + 20), range(PAPER_GPUS)
    selector.begin_epoch(0)
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=PLAN_SAMPLES).astype(np.float32)
    selector.observe(np.arange(PLAN_SAMPLES), {"loss": losses}, 0)
    for epoch in range(1, REPETITIONS + 1):
        start = time.perf_counter()
        plan = Plan.of_selection(full, PAPER_BATCH, 0, epoch)
        assert plan.hash
        plans.append((time.perf_counter() - start) / PLAN_SAMPLES)
        selects.append(seconds(lambda epoch=epoch: selector.begin_epoch(epoch)) / PLAN_SAMPLES)
        steps = min(plan.num_steps, 64)
        slice_s = seconds(lambda plan=plan, steps=steps: [plan.rank_rows(rank, PAPER_GPUS, 0, steps) for rank in ranks])
        slices.append(slice_s / (steps * PAPER_BATCH))
    return plans, selects, slices


def _project(
    *, intake_m: float, plan_s: float, select_s: float, slice_s: float, call_s: float, report_s: float
) -> Iterator[Figure]:
    """Yield the seconds per epoch by the formulas in the module docstring."""
    kept = PAPER_KEPT * PAPER_SAMPLES
    training = kept / (PAPER_GPUS * PAPER_RATE)
    during = kept / (intake_m * 1e6) + kept * slice_s
    between = PAPER_SAMPLES * (plan_s + select_s) + PAPER_GPUS * call_s + report_s
    size = f"{PAPER_SAMPLES:.0e} samples, {PAPER_GPUS} GPUs"
    yield Figure(f"on paper, {size} at {PAPER_RATE:,.0f}/s: training, s per epoch", [training])
    yield Figure("on paper: actor work during training, s per epoch", [during])
    yield Figure("on paper: actor work ÷ training", [during / training])
    yield Figure("on paper: wait between epochs, s", [between])
    yield Figure("on paper: waiting ÷ training", [between / training])
