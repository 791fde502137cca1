"""A run that prunes nothing ÷ the loop that one would write: seconds an epoch, same model, images and augmentation.

ResNet-8 in channels_last, batch 128, SGD, two threads, 32×32 images of `images`. The loop: a Dataset that holds the
decoded images (as torchvision's CIFAR10 does), torchvision's v2 transforms a sample (RandomCrop(32, padding=4),
RandomHorizontalFlip, ToImage, ToDtype, Normalize), a DataLoader with 0 and with 2 workers that live on between epochs,
of which each turn's faster one counts. Ours: InfoBatch at ratio 0, that is with recording, selection and checkpoints;
seconds are the whole epoch's (`seconds.epoch`), and the loop's are its epoch's alone.

With num_workers 0 all run in this process, in turns: each turn trains one more epoch of the same run (`stop_after`).
With one Ray worker the epochs of one run are set against the loop's median over the epochs right before and after it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.harness import Figure, seconds
from benchmarks.images import Images, load
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train
from rayprune.nn.models import build_model
from rayprune.sources import open_data

ROWS, BATCH, TURNS, THREADS = 10_240, 128, 3, 2
LOADERS = (0, 2)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def figures() -> Iterator[Figure]:
    """Yield seconds an epoch of both, and their ratio, without workers and with one."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        images = load(Path(folder), ROWS)
        loop = _Loop(images, Path(folder))
        ours: list[float] = []
        theirs: dict[int, list[float]] = {workers: [] for workers in LOADERS}
        for turn in range(TURNS + 1):
            mine = _ours(Path(folder), images, "in-process", 0, turn + 1)[-1]
            each = {workers: loop.epoch(workers) for workers in LOADERS}
            if turn:  # the first one is warm-up
                ours.append(mine)
                for workers, value in each.items():
                    theirs[workers].append(value)
        best = [min(values) for values in zip(*theirs.values(), strict=True)]
        yield Figure(f"rayprune, ratio 0, num_workers 0, {images.name}, s an epoch", ours)
        for workers, values in theirs.items():
            yield Figure(f"plain loop, DataLoader with {workers} workers, s an epoch", values)
        yield Figure("num_workers 0 ÷ best plain loop", [a / b for a, b in zip(ours, best, strict=True)], "≤ 0.95")
        start_ray()
        before = min(theirs, key=lambda workers: statistics.median(theirs[workers]))
        around = [loop.epoch(before)]
        ours = _ours(Path(folder), images, "worker", 1, TURNS + 1)[1:]
        around.append(loop.epoch(before))
        yield Figure("rayprune, ratio 0, 1 worker, s an epoch", ours)
        yield Figure("1 worker ÷ plain loop around it", [value / statistics.median(around) for value in ours], "≤ 0.95")


def _ours(folder: Path, images: Images, name: str, workers: int, epochs: int) -> list[float]:
    """Train up to an epoch, from where the run stands, and return the seconds of its epochs so far."""
    config = make_config(
        {
            "data": {**images.keys(folder / "cache"), "limit": ROWS},
            "model": {"name": "resnet8"},
            "method": {"name": "infobatch", "prune_ratio": 0.0},
            "train": {"epochs": TURNS + 1, "batch_size": BATCH, "precision": "fp32", "stop_after": epochs},
            "optim": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "constant"},
            "scaling": {"num_workers": workers, "threads": THREADS, "use_gpu": False, "stream": "local"},
            "run": {"storage_path": str(folder), "name": name},
        }
    )
    return [line["seconds"]["epoch"] - line["seconds"]["validate"] for line in train(config).metrics]


class _Pictures(Dataset[tuple[Any, int]]):
    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self._images, self._labels = images, labels
        self._transform = v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        return self._transform(Image.fromarray(self._images[position])), int(self._labels[position])


class _Loop:
    """The loop that one would write, an epoch a call."""

    def __init__(self, images: Images, folder: Path) -> None:
        keys: dict[str, Any] = {**images.keys(folder / "cache")}
        keys.pop("augment")
        rows = open_data(keys.pop("source"), limit=ROWS, **keys).train.take(np.arange(ROWS))
        pictures = _Pictures(rows["image"], rows["label"])
        self._loaders = {
            workers: DataLoader(pictures, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
            for workers in LOADERS
        }
        model = build_model("resnet8", num_classes=10, input_shape=(3, 32, 32))
        self._model = model.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def epoch(self, workers: int) -> float:
        """Train an epoch; return its seconds."""
        torch.set_num_threads(THREADS)
        return seconds(lambda: self._train(self._loaders[workers]))

    def _train(self, loader: DataLoader[Any]) -> None:
        self._model.train()
        for inputs, targets in loader:
            self._optimizer.zero_grad(set_to_none=True)
            logits = self._model(inputs.to(memory_format=torch.channels_last))
            functional.cross_entropy(logits, targets).backward()
            self._optimizer.step()
