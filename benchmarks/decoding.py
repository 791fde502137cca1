"""Rows per second of images decoded from files compared with a PyTorch DataLoader, and the gain of the decoded cache.

The data are 4,000 JPEGs of 64×64 pixels in ten class folders (smooth noise with some grain), read in batches of 128 in
a new random order each epoch. The source is read as the local stream reads it: a thread fetches spans of 2,048 ids
ahead of the batches. The DataLoader decodes the same files, in this process or in two persistent workers, with the
source's decoder or with Pillow. All variants alternate.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Figure, alternate, ratios, seconds
from rayprune.sources import SampleSource, open_data
from rayprune.sources.images.decode import decode_jpegs

ROWS, PIXELS, CLASSES = 4_000, 64, 10
BATCH, SPAN, EPOCHS = 128, 2_048, 9
WORKERS = (0, 2)
# A cached epoch takes milliseconds, so a few are timed together.
CACHED_EPOCHS, FIRST_EPOCHS = 3, 5


def figures() -> Iterator[Figure]:
    """Yield rows per second and their ratios, then the seconds of a first and of a cached epoch and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images")
        yield from _compare_loaders(root / "images")
        yield from _compare_cache(root)


def write_images(root: Path) -> None:
    """Write the JPEGs, `<class>/<number>.jpg`."""
    rng = np.random.default_rng(0)
    for number in range(ROWS):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC), dtype=np.float32)
        picture = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
        file = root / str(number % CLASSES) / f"{number:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file, quality=90)


class _Files(Dataset[tuple[np.ndarray, int]]):
    """A typical hand-written dataset: a list of files, opened and decoded one by one."""

    def __init__(self, root: Path, decode: Callable[[bytes], np.ndarray]) -> None:
        self._files = sorted((str(file), int(file.parent.name)) for file in root.rglob("*.jpg"))
        self._decode = decode

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        file, label = self._files[position]
        return self._decode(Path(file).read_bytes()), label


def decode_with_pillow(encoded: bytes) -> np.ndarray:
    """Decode with Pillow, as hand-written loops usually do."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image.convert("RGB"))


def decode_as_source(encoded: bytes) -> np.ndarray:
    """Decode as the source does."""
    pixels = decode_jpegs([encoded], 3)[0]
    assert pixels is not None
    return pixels


DECODERS = {"same decoder": decode_as_source, "Pillow": decode_with_pillow}


def _compare_loaders(images: Path) -> Iterator[Figure]:
    source = _open(images, "none")
    loaders = {
        _loader_name(name, workers): DataLoader(
            _Files(images, decode), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        for name, decode in DECODERS.items()
        for workers in WORKERS
    }
    epochs = itertools.count()
    measures = {"source": lambda: _rate(lambda: read_epoch(source, next(epochs)))}
    for key, loader in loaders.items():
        measures[key] = lambda loader=loader: _rate(lambda: _load_epoch(loader))
    rates = alternate(measures, EPOCHS)
    yield Figure("image_folder, decoding at every visit, rows/s", rates["source"])
    for key in loaders:
        yield Figure(f"{key}, rows/s", rates[key])
    for name in DECODERS:
        best = [max(both) for both in zip(*(rates[_loader_name(name, workers)] for workers in WORKERS), strict=True)]
        yield Figure(f"image_folder ÷ best DataLoader, {name}", ratios(rates["source"], best), "≥ 1.3")


def _loader_name(decoder: str, workers: int) -> str:
    return f"DataLoader, {decoder}, {workers} workers"


def _compare_cache(root: Path) -> Iterator[Figure]:
    first, cached = [], []
    for number in range(FIRST_EPOCHS + 1):
        source = _open(root / "images", "disk", root / f"cache-{number}")
        first.append(seconds(lambda source=source: read_epoch(source, 0)))
        cached.append(seconds(lambda source=source: [read_epoch(source, epoch) for epoch in range(CACHED_EPOCHS)]))
    first, cached = first[1:], [value / CACHED_EPOCHS for value in cached[1:]]
    yield Figure("first epoch, decoding into the cache, s", first)
    yield Figure("cached epoch, s", cached)
    yield Figure("first epoch ÷ cached epoch", ratios(first, cached), "≥ 10")


def _open(images: Path, cache: str, cache_dir: Path | None = None) -> SampleSource:
    folder = None if cache_dir is None else str(cache_dir)
    return open_data("image_folder", path=str(images), validation_fraction=0, cache=cache, cache_dir=folder).train


def _rate(epoch: Callable[[], int]) -> float:
    return ROWS / seconds(epoch)


def read_epoch(source: SampleSource, epoch: int) -> int:
    """Read all rows in a random order, one span ahead; return the number of rows in the batches."""
    order = np.random.default_rng(epoch).permutation(len(source))
    spans = [order[start : start + SPAN] for start in range(0, len(order), SPAN)]
    rows = 0
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(source.take, spans[0])
        for position in range(len(spans)):
            columns = pending.result()
            if position + 1 < len(spans):
                pending = reader.submit(source.take, spans[position + 1])
            for start in range(0, len(columns["label"]), BATCH):
                batch = {name: torch.from_numpy(column[start : start + BATCH]) for name, column in columns.items()}
                rows += len(batch["image"])
    assert rows == len(source)
    return rows


def _load_epoch(loader: DataLoader[tuple[np.ndarray, int]]) -> int:
    rows = sum(len(images) for images, _ in loader)
    assert rows == ROWS
    return rows
