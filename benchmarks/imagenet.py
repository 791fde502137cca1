"""Data of the size of ImageNet-1k: 1,281,167 samples, of about 100 kB as JPEG and 150 kB decoded to 224×224.

Runs only by name (`python -m benchmarks imagenet`): it takes some 8 minutes and 8 GB of disk.
RAYPRUNE_IMAGENET_ROWS sets another number of samples.

*Stream*: an epoch of decoded rows through Ray Data to one worker at three prune ratios. The rows are made from their
ids instead of being read and decoded, which would take an hour on two cores; so the rows per second are the stream's
own. *Files*: real JPEGs in Parquet and WebDataset, fewer of them, decoded at every visit; what is read from storage for
each kept sample. *State*: the files of a checkpoint, for a method with a number per sample and for TDDS, which keeps
the probabilities of all classes.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train

from benchmarks.harness import POSITION, Figure, seconds
from benchmarks.images import encode_jpeg
from benchmarks.soak import resources
from benchmarks.stream import BATCH, EpochTimer, in_worker
from rayprune.core import Plan, Selector
from rayprune.engine.cluster import start_ray
from rayprune.engine.data.transport import LocalStream, RayStream
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.methods import build_method
from rayprune.sources import SampleSource, open_data
from rayprune.sources.base import Column, DescribedSource, RowCost, Schema

SAMPLES = int(os.environ.get("RAYPRUNE_IMAGENET_ROWS", "1281167"))
CLASSES, SHAPE = 1000, (224, 224, 3)
RATIOS = (0.0, 0.5, 0.9)
# Files: few different images, as their content does not matter; row groups as the datasets library writes them.
FILE_SAMPLES, IMAGES, GROUP_ROWS, SHARD_ROWS = 8_192, 64, 100, 1_024


class MadeImages(DescribedSource):
    """Decoded images that are made from their ids; reading one costs a copy."""

    def __init__(self, num_samples: int) -> None:
        columns = {"image": Column(SHAPE, "uint8"), "label": Column((), "int64")}
        super().__init__(num_samples, Schema(columns, num_classes=CLASSES), "made")

    @property
    def row_cost(self) -> RowCost:
        """Like that of images to decode."""
        return "expensive"

    def _read_labels(self) -> np.ndarray:
        return np.arange(len(self)) % CLASSES

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return images whose pixels are all their id modulo 256."""
        images = np.empty((ids.size, *SHAPE), np.uint8)
        images[:] = (ids % 256).astype(np.uint8)[:, None, None, None]
        return {"image": images, "label": ids % CLASSES}


class Peak(threading.Thread):
    """The most memory that this process, its descendants and the object store have held together.

    Attributes:
        num_bytes: so far; looked at once a second.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_bytes, self._done = 0, threading.Event()

    def run(self) -> None:
        """Look until the block ends."""
        while not self._done.wait(1.0):
            counts = resources()
            self.num_bytes = max(
                self.num_bytes, counts["all processes: bytes"] + counts["all nodes: object store bytes"]
            )

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def figures() -> Iterator[Figure]:
    """Yield the figures of the stream, the files and the state."""
    yield from stream()
    yield from files()
    yield from state()


def _method(ratio: float) -> dict[str, Any]:
    return {"name": "random_epoch", "prune_ratio": ratio} if ratio else {"name": "full"}


def stream() -> Iterator[Figure]:
    """Yield the figures of the stream."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _stream(Path(folder))


def files() -> Iterator[Figure]:
    """Yield the figures of the files."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _files(Path(folder))


def state() -> Iterator[Figure]:
    """Yield the figures of the state."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _state(Path(folder))


def _stream(folder: Path) -> Iterator[Figure]:
    start_ray()
    source = MadeImages(SAMPLES)
    for ratio in RATIOS:
        part = folder / f"stream-{ratio}"
        part.mkdir()
        with Peak() as peak:
            values = in_worker(part, source, _method(ratio), 1, _one_epoch)
        name = f"stream of {SAMPLES:,} decoded rows, prune ratio {ratio:g}"
        yield Figure(f"{name}: plan to first batch, s", values["first"])
        yield Figure(f"{name}: kept rows/s", values["rate"])
        yield Figure(f"{name}: peak memory of all processes and the object store, GB", [peak.num_bytes / 1e9])
    ray.shutdown()


def _one_epoch(scores: ScoreClient, source: SampleSource, folder: Path, epochs: int) -> dict[str, list[float]]:
    first, rate = EpochTimer(scores).stream(RayStream(ray.train.get_dataset_shard("train")))
    return {"first": [first], "rate": [rate]}


def _files(folder: Path) -> Iterator[Figure]:
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 375, 500, 3), dtype=np.uint8)
    smooth = (noise // 4 + np.linspace(0, 190, 500)[:, None]).astype(np.uint8)
    jpegs = [encode_jpeg(image) for image in smooth]
    stored = float(np.mean([len(jpeg) for jpeg in jpegs]))
    for kind, write in (("parquet", _write_parquet), ("webdataset", _write_shards)):
        place = folder / kind
        place.mkdir()
        write(place, jpegs)
        options = {"image_size": SHAPE[0], "cache": "none", "validation_fraction": 0, "num_classes": CLASSES}
        source = open_data(kind, path=str(place), **options).train
        for ratio in RATIOS:
            spec = ScoreSpec(_method(ratio), source, 0, 3, 0, BATCH, "pad", source.schema.row_bytes, None, 0)
            timer = EpochTimer(ScoreClient.in_process(spec))
            first, rate = timer.stream(LocalStream({"train": source}))
            name = f"{kind}, JPEGs of {stored / 1e3:.0f} kB, prune ratio {ratio:g}"
            yield Figure(f"{name}: read per kept sample ÷ its size", [timer.bytes_per_row / stored])
            yield Figure(f"{name}: plan to first batch, s", [first])
            yield Figure(f"{name}: kept rows/s, decoded in one process", [rate])


def _write_parquet(folder: Path, jpegs: list[bytes]) -> None:
    rows = range(FILE_SAMPLES)
    images = [{"bytes": jpegs[row % IMAGES], "path": None} for row in rows]
    table = pa.table({"image": images, "label": [row % CLASSES for row in rows]})
    pq.write_table(
        table, folder / "train-00000.parquet", row_group_size=GROUP_ROWS, compression="none", use_dictionary=False
    )


def _write_shards(folder: Path, jpegs: list[bytes]) -> None:
    for start in range(0, FILE_SAMPLES, SHARD_ROWS):
        with tarfile.open(folder / f"train-{start:06d}.tar", "w") as shard:
            for row in range(start, start + SHARD_ROWS):
                for suffix, content in (("jpg", jpegs[row % IMAGES]), ("cls", str(row % CLASSES).encode())):
                    member = tarfile.TarInfo(f"{row:08d}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def _state(folder: Path) -> Iterator[Figure]:
    probs = np.full((1, CLASSES), 1.0 / CLASSES, np.float32)
    signals = {"loss": np.ones(1, np.float32), "probs": probs}
    for name in ("infobatch", "tdds"):
        selector = Selector(build_method({"name": name}), SAMPLES, 20, 0)
        selection = selector.begin_epoch(0)
        selector.observe(np.zeros(1, np.int64), signals, 0)  # sets the length of vectors
        parts: dict[str, Any] = {"model": {}, "trainer": {}, "selector": selector.state_dict()}
        place = folder / name
        place.mkdir()
        taken = seconds(lambda place=place, parts=parts: write_checkpoint(place, 1, **parts, position=POSITION))
        size = sum(file.stat().st_size for file in (place / "checkpoints" / "epoch-000001").iterdir())
        title = f"{name}, {SAMPLES:,} samples, {CLASSES:,} classes"
        yield Figure(f"{title}: checkpoint without the network, MB", [size / 1e6])
        yield Figure(f"{title}: writing it, s", [taken])
        if name == "infobatch":
            plan = Plan.of_selection(selection, BATCH, 0, 0)
            yield Figure(f"{title}: order of the plan, MB", [plan.order.nbytes / 1e6])
