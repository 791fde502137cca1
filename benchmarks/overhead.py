"""Overhead of pruning: seconds of pruned epochs ÷ seconds of full epochs ÷ share of samples trained.

ResNet-8 on CIFAR-10's training images (see `images`), one worker with one thread, no validation, both transports. A
schedule of the prune ratio alternates full and pruned epochs within one run: after an uncounted first epoch, full,
pruned, pruned, full, full, pruned, pruned, full. That gives four adjacent pairs; each kind comes first in two of them.
The figure of a pair is

    (seconds of the pruned epoch ÷ seconds of the full one) ÷ (samples of the pruned epoch ÷ samples of the full one)

where seconds cover the whole epoch (`seconds.epoch` of metrics.jsonl: training, waiting for rows, selection, recording,
checkpoint). The selection of an epoch is made while the previous epoch closes, so it counts in `seconds.select` of the
previous line, together with the plan of that epoch. To charge a full epoch with no cost of pruning, a pruned epoch
bears all of its own `select` and of the previous line's, and a full epoch bears none. This errs against pruning.
Samples are those trained, without padding. Counting padded rows as trained would flatter the figure; it is shown
separately.

The duration of a training step drifts from one epoch to the next, by about 5 % here, and the figure of a pair includes
that drift. "Outside the steps" does not: it is the share of a pruned epoch that is not spent in training steps (waiting
for rows, selection, recording, checkpoint).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, ratios
from benchmarks.images import Images, load
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train

ROWS, BATCH = 20_480, 128
ORDER = (False, True, True, False) * 2  # whether an epoch is pruned; (0, 1), (2, 3), … are the pairs
_PARTS = ("train", "data_wait", "select", "record", "checkpoint")
# InfoBatch prunes only samples below the mean loss, about 60 % of all.
CASES = (("random_epoch", 0.5, "ray"), ("infobatch", 0.8, "local"))


def figures() -> Iterator[Figure]:
    """Yield the figure, the share, and the breakdown of the seconds, for each method and transport."""
    start_ray()
    with tempfile.TemporaryDirectory() as folder:
        images = load(Path(folder), ROWS)
        for method, ratio, stream in CASES:
            lines = _run(Path(folder), images, method, ratio, stream)
            yield from _figures(f"{method}, {stream}, {images.name}", lines)


def _run(folder: Path, images: Images, method: str, ratio: float, stream: str) -> list[dict[str, Any]]:
    epochs = len(ORDER) + 1
    schedule = {
        "schedule": "step",
        "start": 0.9 if method == "random_epoch" else 0.0,  # the uncounted epoch; InfoBatch never prunes the first one
        "milestones": [number / epochs for number in range(1, epochs)],
        "ratios": [ratio if pruned else 0.0 for pruned in ORDER],
    }
    anneal = {"anneal_start": 1.0} if method == "infobatch" else {}
    config = make_config(
        {
            "data": {**images.keys(folder / "cache"), "limit": ROWS},
            "model": {"name": "resnet8"},
            "method": {"name": method, "prune_ratio": schedule, **anneal},
            "train": {"epochs": epochs, "batch_size": BATCH},
            "optim": {"lr": 0.05, "schedule": "onecycle"},
            "scaling": {"num_workers": 1, "threads": 1, "cpus_per_worker": 1, "use_gpu": False, "stream": stream},
            "run": {"storage_path": str(folder), "name": f"{method}-{stream}"},
        }
    )
    return train(config).metrics


def _figures(name: str, lines: list[dict[str, Any]]) -> Iterator[Figure]:
    epochs = [_epoch(*each) for each in zip(lines[:-1], lines[1:], ORDER, strict=True)]
    for epoch, pruned in zip(epochs, ORDER, strict=True):
        assert (epoch["samples"] < ROWS) == pruned, "an epoch was pruned that should be full, or the other way round"
    pairs = [(epochs[first], epochs[first + 1]) for first in range(0, len(epochs), 2)]
    pairs = [tuple(sorted(pair, key=lambda epoch: epoch["samples"])) for pair in pairs]
    relative = [pruned["seconds"] / full["seconds"] for pruned, full in pairs]
    for what, count, goal in (("samples", "samples", "≤ 1.02"), ("samples, padding counted", "rows", "")):
        shares = [pruned[count] / full[count] for pruned, full in pairs]
        yield Figure(f"pruned ÷ full ÷ share of {what}; {name}", ratios(relative, shares), goal)
    outside = [sum(pruned[part] for part in _PARTS[1:]) / pruned["seconds"] for pruned, _ in pairs]
    yield Figure(f"outside the steps ÷ pruned epoch; {name}", outside, "≤ 0.02")
    yield Figure(f"share of samples trained; {name}", [pruned["samples"] / full["samples"] for pruned, full in pairs])
    for side, kind in ((1, "full"), (0, "pruned")):
        for part in ("seconds", *_PARTS):
            label = "epoch" if part == "seconds" else part
            yield Figure(f"  {kind} epoch, {label}, s; {name}", [pair[side][part] for pair in pairs])


def _epoch(previous: dict[str, Any], line: dict[str, Any], pruned: bool) -> dict[str, float]:
    """Return an epoch's samples and seconds, with all selection charged to pruned epochs."""
    seconds = line["seconds"]
    samples = line["samples_trained"] - previous["samples_trained"]
    select = seconds["select"] + previous["seconds"]["select"] if pruned else 0.0
    return {
        **{part: seconds[part] for part in _PARTS},
        "select": select,
        "seconds": seconds["epoch"] - seconds["validate"] - seconds["select"] + select,
        "samples": samples,
        "rows": samples + line["samples_padded"] - previous["samples_padded"],
    }
