"""Samples a second with one and two workers, and what 64 GPUs and 1e9 samples would ask of the actor and the driver.

Measured: ResNet-8 on 32×32×3 random images, one thread a worker, batch 128 (global), recording on. Two workers share
this machine's cores: on two of them, 2 is the most that their ratio can be.

On paper, for N samples of which a share k is kept, trained at R samples a second by each of G GPUs:

    training = k·N ÷ (G·R)
    beside   = k·N ÷ i + k·N·c        in the actor, while the GPUs train
    between  = N·(p + s) + G·f + b    all GPUs wait for it

with i observations a second (calls of 262,144), c, p, s seconds a sample to cut the ranks' shares, to lay out the plan
and to select (measured at 1e7 here; the benchmark `plan` has 1e8), f seconds for a call that carries nothing (each rank
flushes once) and b for checkpoint and report (of this small model; a large one's checkpoint comes on top, as in any
run). The actor has one thread: at beside ÷ training = 1 it becomes the limit. N, G, R and k are assumptions. Cutting is
the `stream: local` way; the ray way hands out the same ids once as read tasks.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.actor import intake
from benchmarks.harness import Figure, seconds
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
    """Yield samples a second, their ratio, the constants, and what they come to at the size on paper."""
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
        yield Figure("2 workers ÷ 1 worker", [b / a for a, b in zip(rates[1], rates[2], strict=True)])
        (folder / "intake").mkdir()
        intakes, latencies = intake(folder / "intake", PUSH_ROWS)
    plans, selects, shares = _driver_seconds()
    yield Figure(f"i: intake in calls of {PUSH_ROWS:,}, million samples/s", intakes)
    yield Figure("p: plan, ns a sample", [value * 1e9 for value in plans])
    yield Figure("s: selection, ns a sample", [value * 1e9 for value in selects])
    yield Figure("c: cutting shares, ns a kept sample", [value * 1e9 for value in shares])
    yield Figure("f: a call of the actor, ms", [value * 1e3 for value in latencies])
    yield Figure("b: checkpoint and report, ms", [value * 1e3 for value in reports[2]])
    medians = [float(np.median(values)) for values in (intakes, plans, selects, shares, latencies, reports[2])]
    yield from _on_paper(*medians)


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


def _driver_seconds() -> tuple[list[float], list[float], list[float]]:
    """Return seconds a sample to lay out a plan, to select, and (a kept one) to cut the ranks' shares."""
    full = Selection.full(PLAN_SAMPLES)
    plans, selects, shares = [], [], []
    selector = Selector(InfoBatch(), PLAN_SAMPLES, REPETITIONS + 20)
    selector.begin_epoch(0)
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=PLAN_SAMPLES).astype(np.float32)
    selector.observe(np.arange(PLAN_SAMPLES), {"loss": losses}, 0)
    for epoch in range(1, REPETITIONS + 1):
        started = time.perf_counter()
        plan = Plan.of_selection(full, PAPER_BATCH, 0, epoch)
        assert plan.hash
        plans.append((time.perf_counter() - started) / PLAN_SAMPLES)
        selects.append(seconds(lambda epoch=epoch: selector.begin_epoch(epoch)) / PLAN_SAMPLES)
        steps = min(plan.num_steps, 64)
        cut = seconds(
            lambda plan=plan, steps=steps: [plan.rank_rows(r, PAPER_GPUS, 0, steps) for r in range(PAPER_GPUS)]
        )
        shares.append(cut / (steps * PAPER_BATCH))
    return plans, selects, shares


def _on_paper(
    intake_m: float, plan_s: float, select_s: float, share_s: float, call_s: float, report_s: float
) -> Iterator[Figure]:
    """Yield the seconds of an epoch by the formulas of the module's docstring."""
    kept = PAPER_KEPT * PAPER_SAMPLES
    training = kept / (PAPER_GPUS * PAPER_RATE)
    beside = kept / (intake_m * 1e6) + kept * share_s
    between = PAPER_SAMPLES * (plan_s + select_s) + PAPER_GPUS * call_s + report_s
    size = f"{PAPER_SAMPLES:.0e} samples, {PAPER_GPUS} GPUs"
    yield Figure(f"on paper, {size} at {PAPER_RATE:,.0f}/s: training, s an epoch", [training])
    yield Figure("on paper: the actor beside training, s an epoch", [beside])
    yield Figure("on paper: the actor is busy, share of training", [beside / training])
    yield Figure("on paper: all wait between epochs, s", [between])
    yield Figure("on paper: waiting ÷ training", [between / training])
