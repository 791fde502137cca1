"""The same images from files, tar shards or Parquet give the same run, bit for bit; only the bytes read differ."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rayprune.engine.train.driver import RunResult, train
from rayprune.sources import open_data
from tests.support.runs import results, run_config, same_weights

PARTS = {"train": 160, "val": 40}


def digits() -> dict[str, list[tuple[bytes, int]]]:
    """Return some digits as PNG files, those of a class together, as a folder of classes orders them."""
    source = open_data("digits").train
    rows = source.take(np.arange(sum(PARTS.values())))
    encoded = []
    for image, label in zip(rows["image"], rows["label"], strict=True):
        content = io.BytesIO()
        Image.fromarray(image[..., 0]).save(content, "PNG")
        encoded.append((content.getvalue(), int(label)))
    train, val = encoded[: PARTS["train"]], encoded[PARTS["train"] :]
    return {"train": sorted(train, key=lambda one: one[1]), "val": sorted(val, key=lambda one: one[1])}


def write(root: Path) -> None:
    for part, images in digits().items():
        frame = pd.DataFrame({"image": [{"bytes": content} for content, _ in images], "label": [y for _, y in images]})
        (root / "parquet").mkdir(exist_ok=True)
        frame.to_parquet(root / "parquet" / f"{part}.parquet", row_group_size=10)
        (root / "tar").mkdir(exist_ok=True)
        with tarfile.open(root / "tar" / f"{part}-000.tar", "w") as shard:
            for number, (content, label) in enumerate(images):
                file = root / "folder" / part / str(label) / f"{number:04d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                for suffix, member in (("png", content), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(member)
                    shard.addfile(info, io.BytesIO(member))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    return folder


def run(root: Path, folder: Path, name: str, **data: Any) -> RunResult:
    keys = {"limit": None, "augment": {"crop": 1, "flip": False}, "cache_dir": str(folder / "cache"), **data}
    return train(
        run_config(
            folder,
            name,
            data={**keys, "path": str(root / keys["path"])},
            method={"name": "infobatch", "anneal_start": 1.0},
            train={"epochs": 3, "batch_size": 16},
        )
    )


SOURCES: dict[str, dict[str, Any]] = {
    "files": {"source": "image_folder", "path": "folder"},
    "files, no cache": {"source": "image_folder", "path": "folder", "cache": "none"},
    "files, in memory": {"source": "image_folder", "path": "folder", "cache": "memory"},
    "shards": {"source": "webdataset", "path": "tar"},
    "shards, no cache": {"source": "webdataset", "path": "tar", "cache": "none"},
}


@pytest.fixture(scope="module")
def parquet(root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(root, tmp_path_factory.mktemp("runs"), "parquet", source="parquet", path="parquet")


@pytest.mark.parametrize("name", SOURCES)
def test_all_formats_give_the_same_run(name: str, root: Path, tmp_path: Path, parquet: RunResult) -> None:
    other = run(root, tmp_path, "other", **SOURCES[name])
    assert results(other.metrics) == results(parquet.metrics)
    assert same_weights(other.folder, parquet.folder)
    assert parquet.metrics[-1]["kept"] < PARTS["train"]
