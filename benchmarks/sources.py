"""Rows per second and bytes per row of every kind of source, compared with a DataLoader and a bare loop.

8,192 random images of 32×32×3 bytes in batches of 128: memory-mapped arrays; JPEG files in class folders; JPEGs in
Parquet, in tar shards (WebDataset), in a saved dataset of `datasets`, and in a torch Dataset. All JPEGs are decoded at
every visit (cache none); Parquet is also read from the decoded cache (cache disk).

In this process, these alternate: the local transport, a DataLoader with 0 and with 2 workers that decodes the JPEGs in
memory with Pillow (image_folder and torch_dataset: opens the files one by one; arrays: reads the memory map item by
item), and a bare loop that does the same without a DataLoader. The ray transport alternates with the local one in a Ray
worker, and "ray ÷ local" compares them there. Bytes per row are the bytes read from storage, as counted in
metrics.jsonl, per delivered row.
"""

from __future__ import annotations

import io
import itertools
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

from benchmarks.harness import Figure, alternate, ratios
from benchmarks.images import CLASSES, encode_jpeg, random_images, write_random
from benchmarks.stream import EpochTimer
from rayprune.engine.cluster import start_ray
from rayprune.engine.data.ray_data import plan_dataset, task_rows
from rayprune.engine.data.transport import LocalStream, RayStream
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.sources import SampleSource, open_data

ROWS, BATCH, EPOCHS = 8_192, 128, 3
LOADERS = (0, 2)


def figures() -> Iterator[Figure]:
    """Yield rows/s and bytes/row of each source, and its ratios to the loops."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images, labels = random_images(ROWS)
        jpegs = [encode_jpeg(image) for image in images]
        sources = _write(root, images, labels, jpegs)
        loops: dict[str, Dataset[tuple[np.ndarray, int]]] = {
            "arrays": _Rows(np.load(root / "arrays" / "x_train.npy", mmap_mode="r"), labels),
            "image_folder": _Files(str(root / "folders")),
            "torch_dataset": _Files(str(root / "folders")),
            "": _Encoded(jpegs, labels),
        }
        by_source = {name: _measure(source, loops.get(name, loops[""])) for name, source in sources.items()}
        start_ray()
        by_source_in_worker = _measure_in_worker(root, sources)
    for name, rates in by_source.items():
        in_worker = by_source_in_worker[name]
        yield Figure(f"{name}: local, rows/s", rates["local"])
        yield Figure(f"{name}: ray, rows/s", in_worker["ray"])
        yield Figure(f"{name}: ray, plan to first batch, s", in_worker["first"])
        yield Figure(f"{name}: bytes/row read", rates["bytes"])
        for loop in ("bare loop", *(f"DataLoader, {workers} workers" for workers in LOADERS)):
            yield Figure(f"{name}: local ÷ {loop}", ratios(rates["local"], rates[loop]))
        yield Figure(f"{name}: ray ÷ local, in a worker", ratios(in_worker["ray"], in_worker["local"]))


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
    """Return the torch Dataset of the source `torch_dataset`: the JPEG files, opened one by one."""
    return _Files(folders)


def _write(root: Path, images: np.ndarray, labels: np.ndarray, jpegs: list[bytes]) -> dict[str, SampleSource]:
    """Write the images in every format and open them."""
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
    torch_keys = {"dataset": "benchmarks.sources:pictures", "options": {"folders": str(root / "folders")}}
    kinds: dict[str, dict[str, Any]] = {
        "arrays": {"source": "arrays", "path": str(root / "arrays")},
        "parquet": {"source": "parquet", "path": str(parquet), "validation_files": "", "cache": "none"},
        "parquet, cache disk": {"source": "parquet", "path": str(parquet), "validation_files": "", "cache": "disk"},
        "image_folder": {"source": "image_folder", "path": str(root / "folders"), "cache": "none"},
        "webdataset": {"source": "webdataset", "path": str(root / "shards"), "cache": "none"},
        "huggingface": {"source": "huggingface", "path": str(root / "saved"), "cache": "none"},
        "torch_dataset": {"source": "torch_dataset", "cache": "none", **torch_keys},
    }
    sources = {}
    for name, keys in kinds.items():
        cache = {} if name == "arrays" else {"cache_dir": str(root / "cache")}
        sources[name] = open_data(limit=ROWS, validation_fraction=0, **cache, **keys).train
        sources[name].prepare()
    return sources


def _spec(source: SampleSource) -> ScoreSpec:
    spec = ScoreSpec({"name": "full"}, source, 0, 99, 0, BATCH, "pad", source.schema.row_bytes, None, 0)
    return replace(spec, task_rows=task_rows(source, len(os.sched_getaffinity(0))))


def _measure(source: SampleSource, rows: Dataset[tuple[np.ndarray, int]]) -> dict[str, list[float]]:
    """Return rows/s of the local transport, the loaders and the bare loop, in alternation, and bytes/row."""
    timer, stream = EpochTimer(ScoreClient.in_process(_spec(source))), LocalStream({"train": source})
    loaders = {
        f"DataLoader, {workers} workers": DataLoader(
            rows, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        for workers in LOADERS
    }
    epochs = itertools.count()
    measures = {
        "local": lambda: timer.stream(stream)[1],
        "bytes": lambda: timer.bytes_per_row,
        "bare loop": lambda: _bare_loop(rows, next(epochs)),
    }
    measures |= {name: lambda loader=loader: _loader_rate(loader) for name, loader in loaders.items()}
    return alternate(measures, EPOCHS)


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


def _measure_in_worker(root: Path, sources: dict[str, SampleSource]) -> dict[str, dict[str, list[float]]]:
    """Return rows/s of both transports in a Ray worker, in alternation, and the seconds to Ray's first batch."""
    actors = {name: ScoreClient.start(_spec(source), f"bench-{name}") for name, source in sources.items()}
    out = root / "rates.json"

    def loop() -> None:
        rates: dict[str, dict[str, list[float]]] = {}
        for name, source in sources.items():
            timer = EpochTimer(actors[name][0])
            via = {"local": LocalStream({"train": source}), "ray": RayStream(ray.train.get_dataset_shard(name))}
            rounds = [{kind: timer.stream(stream) for kind, stream in via.items()} for _ in range(EPOCHS + 1)][1:]
            rates[name] = {kind: [each[kind][1] for each in rounds] for kind in via}
            rates[name]["first"] = [each["ray"][0] for each in rounds]
        out.write_text(json.dumps(rates))

    TorchTrainer(
        loop,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(root), name="train"),
        datasets={name: plan_dataset(actors[name][0], {"train": source}) for name, source in sources.items()},
    ).fit()
    for _, (handle,) in actors.values():
        ray.kill(handle)
    rates: dict[str, dict[str, list[float]]] = json.loads(out.read_text())
    return rates
