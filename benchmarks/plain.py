"""A run without pruning ÷ a hand-written loop: seconds per epoch, same model, images and augmentation.

ResNet-8 in channels_last, batch 128, SGD, two threads, 32×32 images (see `images`). The loop uses a Dataset that holds
the decoded images (as torchvision's CIFAR10 does), torchvision's v2 transforms per sample (RandomCrop(32, padding=4),
RandomHorizontalFlip, ToImage, ToDtype, Normalize), and a DataLoader with 0 or with 2 persistent workers; the faster of
the two counts in each round. rayprune runs InfoBatch at ratio 0, which includes recording, selection and checkpoints;
its seconds cover the whole epoch (`seconds.epoch`), the loop's only its training.

With num_workers 0 everything runs in this process, in alternation: each round trains one more epoch of the same run
(`stop_after`). With one Ray worker, the epochs of one run are compared with the loop's median over the epochs directly
before and after the run.
"""

from __future__ import annotations

import itertools
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

from benchmarks.harness import Figure, alternate, ratios, seconds
from benchmarks.images import Images, load
from rayprune.config import make_config
from rayprune.engine.cluster import start_ray
from rayprune.engine.train.driver import train
from rayprune.nn.models import build_model
from rayprune.sources import open_data

ROWS, BATCH, ROUNDS, THREADS = 10_240, 128, 3, 2
LOADERS = (0, 2)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


def figures() -> Iterator[Figure]:
    """Yield seconds per epoch of both and their ratio, without workers and with one."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        images = load(Path(folder), ROWS)
        loop = _Loop(images, Path(folder))
        epochs = itertools.count(1)
        loaders = {f"DataLoader with {workers} workers": workers for workers in LOADERS}
        measures = {"rayprune": lambda: _run_epochs(Path(folder), images, "in-process", 0, next(epochs))[-1]}
        measures |= {name: lambda workers=workers: loop.epoch(workers) for name, workers in loaders.items()}
        times = alternate(measures, ROUNDS)
        engine = times.pop("rayprune")
        best = [min(values) for values in zip(*times.values(), strict=True)]
        yield Figure(f"rayprune, ratio 0, num_workers 0, {images.name}, s per epoch", engine)
        for name, values in times.items():
            yield Figure(f"plain loop, {name}, s per epoch", values)
        yield Figure("num_workers 0 ÷ best plain loop", ratios(engine, best), "≤ 0.95")
        start_ray()
        fastest = loaders[min(times, key=lambda name: statistics.median(times[name]))]
        neighbors = [loop.epoch(fastest)]
        engine = _run_epochs(Path(folder), images, "worker", 1, ROUNDS + 1)[1:]
        neighbors.append(loop.epoch(fastest))
        yield Figure("rayprune, ratio 0, 1 worker, s per epoch", engine)
        median = statistics.median(neighbors)
        yield Figure("1 worker ÷ plain loop before and after", [value / median for value in engine], "≤ 0.95")


def _run_epochs(folder: Path, images: Images, name: str, workers: int, epochs: int) -> list[float]:
    """Train a run, or continue it, up to `epochs` epochs; return the seconds of all its epochs."""
    config = make_config(
        {
            "data": {**images.keys(folder / "cache"), "limit": ROWS},
            "model": {"name": "resnet8"},
            "method": {"name": "infobatch", "prune_ratio": 0.0},
            "train": {"epochs": ROUNDS + 1, "batch_size": BATCH, "precision": "fp32", "stop_after": epochs},
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
    """A hand-written training loop; one call trains one epoch."""

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
        """Train one epoch; return its seconds."""
        torch.set_num_threads(THREADS)
        return seconds(lambda: self._train(self._loaders[workers]))

    def _train(self, loader: DataLoader[Any]) -> None:
        self._model.train()
        for inputs, targets in loader:
            self._optimizer.zero_grad(set_to_none=True)
            logits = self._model(inputs.to(memory_format=torch.channels_last))
            functional.cross_entropy(logits, targets).backward()
            self._optimizer.step()
