"""Rows a second and bytes a row of every kind of source, over both transports, against a DataLoader and a bare loop.

8,192 random images of 32×32×3 bytes: as arrays (memory-mapped); as JPEG files in class folders; JPEGs in Parquet, in
tar shards (WebDataset), in a saved data set of `datasets`, and as a torch Dataset over the JPEGs, each decoded at every
visit (cache none); and Parquet once more out of the decoded cache (cache disk). Batches of 128.

In turns in this process: the local transport, a DataLoader over the JPEGs in memory with 0 and with 2 workers, which
decodes with Pillow (for image_folder and torch_dataset: over the files, opened one by one; for arrays: over the memory
map, item by item), and a bare loop that does the same without a
DataLoader. The ray transport runs in one Ray worker, in turns with the local one there: "ray ÷ local" is of that
process. Bytes a row are those read from storage as metrics.jsonl counts them, per row delivered.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import ray.train
from PIL import Image
from ray.train.torch import TorchTrainer
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Figure
from benchmarks.images import CLASSES, encoded, random_images, write_random
from benchmarks.stream import Epochs
from rayprune.engine.cluster import start_ray
from rayprune.engine.data.ray_data import plan_dataset, task_rows
from rayprune.engine.data.transport import LocalStream, RayStream
from rayprune.engine.scoring.actor import ScoreSpec
from rayprune.engine.scoring.client import ScoreClient
from rayprune.sources import SampleSource, open_data

ROWS, BATCH, EPOCHS = 8_192, 128, 3
LOADERS = (0, 2)


def figures() -> Iterator[Figure]:
    """Yield rows/s and bytes/row of each source, and its ratios to the loops."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images, labels = random_images(ROWS)
        jpegs = [encoded(image) for image in images]
        sources = _write(root, images, labels, jpegs)
        loops: dict[str, Dataset[tuple[np.ndarray, int]]] = {
            "arrays": _Rows(np.load(root / "arrays" / "x_train.npy", mmap_mode="r"), labels),
            "image_folder": _Files(str(root / "folders")),
            "torch_dataset": _Files(str(root / "folders")),
            "": _Encoded(jpegs, labels),
        }
        rates = {name: _here(source, loops.get(name, loops[""])) for name, source in sources.items()}
        start_ray()
        there = _in_a_worker(root, sources)
    for name, seen in rates.items():
        yield Figure(f"{name}: local, rows/s", seen["local"])
        yield Figure(f"{name}: ray, rows/s", there[name]["ray"])
        yield Figure(f"{name}: ray, plan to first batch, s", there[name]["first"])
        yield Figure(f"{name}: bytes/row read", seen["bytes"])
        for loop in ("bare loop", *(f"DataLoader, {workers} workers" for workers in LOADERS)):
            yield Figure(f"{name}: local ÷ {loop}", [a / b for a, b in zip(seen["local"], seen[loop], strict=True)])
        ratios = [a / b for a, b in zip(there[name]["ray"], there[name]["local"], strict=True)]
        yield Figure(f"{name}: ray ÷ local, in a worker", ratios)


@dataclass(frozen=True)
class _Encoded(Dataset[tuple[np.ndarray, int]]):
    jpegs: list[bytes]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        with Image.open(io.BytesIO(self.jpegs[position])) as image:
            return np.array(image.convert("RGB")), int(self.labels[position])


@dataclass(frozen=True)
class _Rows(Dataset[tuple[np.ndarray, int]]):
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return np.array(self.images[position]), int(self.labels[position])


@dataclass(frozen=True)
class _Files(Dataset[tuple[np.ndarray, int]]):
    folders: str

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        label = position % CLASSES
        with Image.open(f"{self.folders}/{label}/{position:05}.jpg") as image:
            return np.array(image.convert("RGB")), label


def pictures(folders: str) -> Dataset[tuple[np.ndarray, int]]:
    """Return the torch Dataset that the source `torch_dataset` names: the JPEG files, opened one by one."""
    return _Files(folders)


def _write(root: Path, images: np.ndarray, labels: np.ndarray, jpegs: list[bytes]) -> dict[str, SampleSource]:
    """Write the images in every form and open them."""
    (root / "arrays").mkdir()
    np.save(root / "arrays" / "x_train.npy", images)
    np.save(root / "arrays" / "y_train.npy", labels)
    parquet = write_random(root, ROWS)
    for row, (jpg, label) in enumerate(zip(jpegs, labels, strict=True)):
        file = root / "folders" / str(label) / f"{row:05}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpg)
    (root / "shards").mkdir()
    with tarfile.open(root / "shards" / "train-0.tar", "w") as archive:
        for row, (jpg, label) in enumerate(zip(jpegs, labels, strict=True)):
            for suffix, content in (("jpg", jpg), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{row:05}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": [{"bytes": jpg, "path": None} for jpg in jpegs], "label": labels}
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(root / "saved"))
    by_torch = {"dataset": "benchmarks.sources:pictures", "options": {"folders": str(root / "folders")}}
    kinds: dict[str, dict[str, Any]] = {
        "arrays": {"source": "arrays", "path": str(root / "arrays")},
        "parquet": {"source": "parquet", "path": str(parquet), "validation_files": "", "cache": "none"},
        "parquet, cache disk": {"source": "parquet", "path": str(parquet), "validation_files": "", "cache": "disk"},
        "image_folder": {"source": "image_folder", "path": str(root / "folders"), "cache": "none"},
        "webdataset": {"source": "webdataset", "path": str(root / "shards"), "cache": "none"},
        "huggingface": {"source": "huggingface", "path": str(root / "saved"), "cache": "none"},
        "torch_dataset": {"source": "torch_dataset", "cache": "none", **by_torch},
    }
    opened = {}
    for name, keys in kinds.items():
        cached = {} if name == "arrays" else {"cache_dir": str(root / "cache")}
        opened[name] = open_data(limit=ROWS, validation_fraction=0, **cached, **keys).train
        opened[name].prepare()
    return opened


def _spec(source: SampleSource) -> ScoreSpec:
    spec = ScoreSpec({"name": "full"}, source, 0, 99, 0, BATCH, "pad", source.schema.row_bytes, None, 0)
    return replace(spec, task_rows=task_rows(source, len(os.sched_getaffinity(0))))


def _here(source: SampleSource, rows: Dataset[tuple[np.ndarray, int]]) -> dict[str, list[float]]:
    """Return rows/s of the local transport, the loaders and the bare loop, in turns, and bytes/row."""
    epochs, stream = Epochs(ScoreClient.in_process(_spec(source))), LocalStream({"train": source})
    loaders = {
        f"DataLoader, {workers} workers": DataLoader(
            rows, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        for workers in LOADERS
    }
    seen: dict[str, list[float]] = {name: [] for name in ("local", "bytes", "bare loop", *loaders)}
    for epoch in range(EPOCHS + 1):
        rates = {"local": epochs.stream(stream)[1], "bytes": epochs.bytes_a_row, "bare loop": _bare_loop(rows, epoch)}
        rates |= {name: _loader_rate(loader) for name, loader in loaders.items()}
        if epoch:  # the first one is warm-up
            for name, rate in rates.items():
                seen[name].append(rate)
    return seen


def _loader_rate(loader: DataLoader[tuple[np.ndarray, int]]) -> float:
    start = time.perf_counter()
    assert sum(len(images) for images, _ in loader) == ROWS
    return ROWS / (time.perf_counter() - start)


def _bare_loop(rows: Any, epoch: int) -> float:
    start = time.perf_counter()
    order = np.random.default_rng(epoch).permutation(ROWS)
    count = 0
    for first in range(0, ROWS, BATCH):
        images, labels = zip(*(rows[int(row)] for row in order[first : first + BATCH]), strict=True)
        count += len(np.stack(images)) + 0 * len(np.array(labels))
    assert count == ROWS
    return ROWS / (time.perf_counter() - start)


def _in_a_worker(root: Path, sources: dict[str, SampleSource]) -> dict[str, dict[str, list[float]]]:
    """Return rows/s of both transports of each source, in turns in one Ray worker, and seconds to Ray's first batch."""
    actors = {name: ScoreClient.start(_spec(source), f"bench-{name}") for name, source in sources.items()}
    out = root / "seen.json"

    def loop() -> None:
        seen: dict[str, dict[str, list[float]]] = {}
        for name, source in sources.items():
            epochs = Epochs(actors[name][0])
            via = {"local": LocalStream({"train": source}), "ray": RayStream(ray.train.get_dataset_shard(name))}
            turns = [{kind: epochs.stream(stream) for kind, stream in via.items()} for _ in range(EPOCHS + 1)]
            seen[name] = {kind: [turn[kind][1] for turn in turns[1:]] for kind in via}
            seen[name]["first"] = [turn["ray"][0] for turn in turns[1:]]
        out.write_text(json.dumps(seen))

    TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(root), name="train"),
        datasets={name: plan_dataset(actors[name][0], {"train": source}) for name, source in sources.items()},
    ).fit()
    for _, handle in actors.values():
        ray.kill(handle)
    seen: dict[str, dict[str, list[float]]] = json.loads(out.read_text())
    return seen
