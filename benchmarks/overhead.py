"""What pruning costs: seconds of pruned epochs ÷ seconds of full ones ÷ the share of the samples that they train.

ResNet-8 on CIFAR-10's training images (see `images`), one worker with one thread, no validation, both transports. Full
and pruned epochs alternate inside one run, by a schedule of the prune ratio, in the order full, pruned, pruned, full,
full, pruned, pruned, full after an uncounted first epoch: four adjacent pairs, of which each side comes first twice.
The figure of a pair is

    (seconds of the pruned epoch ÷ seconds of the full one) ÷ (samples of the pruned epoch ÷ samples of the full one)

where seconds are the whole epoch's (`seconds.epoch` of metrics.jsonl: training, waiting for rows, selection, recording,
checkpoint). A selection is made while the epoch before it closes, and `seconds.select` of that epoch's line holds it
together with that epoch's own plan. So that none of pruning's costs falls to a full epoch, a pruned epoch bears all of
its own `select` and of the line before it, and a full epoch none: this errs against pruning. Samples are those really
trained, without padding; counting padded rows as trained would flatter the figure, and it is shown apart.

What a machine does to the seconds of a training step from one epoch to the next, a twentieth here, is in the figure of
a pair. "Beside the steps" is free of it: the share of a pruned epoch that is no training step (rows waited for,
selection, recording, checkpoint).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure
from benchmarks.images import Images, load
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train

ROWS, BATCH = 20_480, 128
ORDER = (False, True, True, False) * 2  # whether pruned; neighbours (0, 1), (2, 3), … are the pairs
_PARTS = ("train", "data_wait", "select", "record", "checkpoint")
# InfoBatch drops a share of those below the mean loss only, some 60 % of all.
CASES = (("random_epoch", 0.5, "ray"), ("infobatch", 0.8, "local"))


def figures() -> Iterator[Figure]:
    """Yield the figure, the share, and where the seconds went, for each method and transport."""
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
        "start": 0.9 if method == "random_epoch" else 0.0,  # the uncounted epoch; InfoBatch's first one is full anyway
        "milestones": [number / epochs for number in range(1, epochs)],
        "ratios": [ratio if pruned else 0.0 for pruned in ORDER],
    }
    anneals = {"anneal_start": 1.0} if method == "infobatch" else {}
    config = make_config(
        {
            "data": {**images.keys(folder / "cache"), "limit": ROWS},
            "model": {"name": "resnet8"},
            "method": {"name": method, "prune_ratio": schedule, **anneals},
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
        assert (epoch["samples"] < ROWS) == pruned, "an epoch pruned that should not, or the other way round"
    pairs = [(epochs[first], epochs[first + 1]) for first in range(0, len(epochs), 2)]
    pairs = [tuple(sorted(pair, key=lambda epoch: epoch["samples"])) for pair in pairs]
    relative = [pruned["seconds"] / full["seconds"] for pruned, full in pairs]
    for what, count, goal in (("samples", "samples", "≤ 1.02"), ("samples, padding counted", "rows", "")):
        shares = [pruned[count] / full[count] for pruned, full in pairs]
        values = [a / b for a, b in zip(relative, shares, strict=True)]
        yield Figure(f"pruned ÷ full ÷ share of {what}; {name}", values, goal)
    beside = [sum(pruned[part] for part in _PARTS[1:]) / pruned["seconds"] for pruned, _ in pairs]
    yield Figure(f"beside the steps ÷ pruned epoch; {name}", beside, "≤ 0.02")
    yield Figure(f"share of samples trained; {name}", [pruned["samples"] / full["samples"] for pruned, full in pairs])
    for side, kind in ((1, "full"), (0, "pruned")):
        for part in ("seconds", *_PARTS):
            label = "epoch" if part == "seconds" else part
            yield Figure(f"  {kind} epoch, {label}, s; {name}", [pair[side][part] for pair in pairs])


def _epoch(before: dict[str, Any], line: dict[str, Any], pruned: bool) -> dict[str, float]:
    """Return an epoch's samples and seconds, all selection being the pruned epochs'."""
    seconds = line["seconds"]
    samples = line["samples_trained"] - before["samples_trained"]
    select = seconds["select"] + before["seconds"]["select"] if pruned else 0.0
    return {
        **{part: seconds[part] for part in _PARTS},
        "select": select,
        "seconds": seconds["epoch"] - seconds["validate"] - seconds["select"] + select,
        "samples": samples,
        "rows": samples + line["samples_padded"] - before["samples_padded"],
    }
