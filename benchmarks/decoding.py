"""Rows a second of images decoded from files, against a PyTorch DataLoader, and what the decoded cache saves.

4,000 JPEGs of 64×64 pixels in ten class folders, smooth noise with some grain; batches of 128 in a new random order
each time. The source is read as the local stream does, in spans of 2,048 ids a thread ahead of the batches. The
DataLoader decodes the same files in this process and in two workers that live on between epochs, once with the source's
own decoder, once with Pillow as loops usually do. All in turns.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Figure, seconds
from rayprune.sources import SampleSource, open_data
from rayprune.sources.images import decode_jpegs

ROWS, PIXELS, CLASSES = 4_000, 64, 10
BATCH, SPAN, EPOCHS = 128, 2_048, 9
WORKERS = (0, 2)
# A cached epoch is milliseconds long: timed over a few.
CACHED_EPOCHS, FIRST_EPOCHS = 3, 5


def figures() -> Iterator[Figure]:
    """Yield rows a second, their ratio, the seconds of a first and of a cached epoch, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "images")
        yield from _against_the_loader(root / "images")
        yield from _first_and_cached(root)


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
    """The data set one would write: a list of files, opened and decoded one by one."""

    def __init__(self, root: Path, decode: Callable[[bytes], np.ndarray]) -> None:
        self._files = sorted((str(file), int(file.parent.name)) for file in root.rglob("*.jpg"))
        self._decode = decode

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        file, label = self._files[position]
        return self._decode(Path(file).read_bytes()), label


def by_pillow(encoded: bytes) -> np.ndarray:
    """Decode as a loop usually does."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.array(image.convert("RGB"))


def by_the_source(encoded: bytes) -> np.ndarray:
    """Decode as the source does."""
    pixels = decode_jpegs([encoded], 3)[0]
    assert pixels is not None
    return pixels


DECODERS = {"same decoder": by_the_source, "Pillow": by_pillow}


def _against_the_loader(images: Path) -> Iterator[Figure]:
    source = _open(images, "none")
    loaders = {
        (name, workers): DataLoader(
            _Files(images, decode), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        for name, decode in DECODERS.items()
        for workers in WORKERS
    }
    ours: list[float] = []
    seen: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    for epoch in range(EPOCHS + 1):
        mine = _rate(lambda epoch=epoch: read_epoch(source, epoch))
        theirs = {key: _rate(lambda loader=loader: _load_epoch(loader)) for key, loader in loaders.items()}
        if epoch:  # the first one is warm-up
            ours.append(mine)
            for key, rate in theirs.items():
                seen[key].append(rate)
    yield Figure("image_folder, decoding at every visit, rows/s", ours)
    for (name, workers), values in seen.items():
        yield Figure(f"DataLoader, {name}, {workers} workers, rows/s", values)
    for name in DECODERS:
        best = [max(rates) for rates in zip(*(seen[name, workers] for workers in WORKERS), strict=True)]
        yield Figure(
            f"image_folder ÷ best DataLoader, {name}", [a / b for a, b in zip(ours, best, strict=True)], "≥ 1.3"
        )


def _first_and_cached(root: Path) -> Iterator[Figure]:
    first, cached = [], []
    for turn in range(FIRST_EPOCHS + 1):
        source = _open(root / "images", "disk", root / f"cache-{turn}")
        first.append(seconds(lambda source=source: read_epoch(source, 0)))
        cached.append(seconds(lambda source=source: [read_epoch(source, epoch) for epoch in range(CACHED_EPOCHS)]))
    first, cached = first[1:], [value / CACHED_EPOCHS for value in cached[1:]]
    yield Figure("first epoch, decoding into the cache, s", first)
    yield Figure("cached epoch, s", cached)
    yield Figure("first epoch ÷ cached epoch", [a / b for a, b in zip(first, cached, strict=True)], "≥ 10")


def _open(images: Path, cache: str, cache_dir: Path | None = None) -> SampleSource:
    folder = None if cache_dir is None else str(cache_dir)
    return open_data("image_folder", path=str(images), validation_fraction=0, cache=cache, cache_dir=folder).train


def _rate(epoch: Callable[[], int]) -> float:
    return ROWS / seconds(epoch)


def read_epoch(source: SampleSource, epoch: int) -> int:
    """Read all rows in a random order, a span ahead, and return how many came in batches."""
    order = np.random.default_rng(epoch).permutation(len(source))
    spans = [order[start : start + SPAN] for start in range(0, len(order), SPAN)]
    rows = 0
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(source.take, spans[0])
        for position in range(len(spans)):
            columns = ahead.result()
            if position + 1 < len(spans):
                ahead = reader.submit(source.take, spans[position + 1])
            for start in range(0, len(columns["label"]), BATCH):
                batch = {name: torch.from_numpy(column[start : start + BATCH]) for name, column in columns.items()}
                rows += len(batch["image"])
    assert rows == len(source)
    return rows


def _load_epoch(loader: DataLoader[tuple[np.ndarray, int]]) -> int:
    rows = sum(len(images) for images, _ in loader)
    assert rows == ROWS
    return rows
