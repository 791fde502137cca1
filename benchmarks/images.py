"""CIFAR-10 images for the benchmarks that train, or random stand-ins.

RAYPRUNE_CIFAR10 names a folder of Parquet files in the layout of the Hugging Face hub: one column of encoded images,
one of labels. Without it, random JPEG images of the same size and layout are used. The timings do not depend on the
image content, except that InfoBatch prunes other samples. The names of the figures say which images were used.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

VARIABLE = "RAYPRUNE_CIFAR10"
PIXELS, CLASSES = 32, 10
_FILES = 5


@dataclass(frozen=True)
class Images:
    """A folder of images.

    Attributes:
        folder: the folder of the Parquet files.
        name: what the figures call the images.
    """

    folder: Path
    name: str

    def keys(self, cache_dir: Path) -> dict[str, object]:
        """Return the config's `data` section: crop and flip, no limit, no validation part."""
        return {
            "source": "parquet",
            "path": str(self.folder),
            "validation_files": "",
            "validation_fraction": 0,
            "train_files": "*train*",
            "cache": "disk",
            "cache_dir": str(cache_dir),
            "augment": {"crop": 4, "flip": True},
        }


def load(scratch: Path, rows: int) -> Images:
    """Return the real images, or write `rows` random ones under `scratch`."""
    if path := os.environ.get(VARIABLE):
        return Images(Path(path), "CIFAR-10")
    return Images(write_random(scratch, rows), "random images")


def write_random(scratch: Path, rows: int) -> Path:
    """Write random images as Parquet files under `scratch`; return their folder."""
    folder = scratch / "random-images"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = random_images(rows)
    for number, part in enumerate(np.array_split(rng.permutation(rows), _FILES)):
        cells = [{"bytes": encode_jpeg(images[row]), "path": None} for row in part]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"img": pa.array(cells, kind), "label": pa.array(labels[part], pa.int64())})
        pyarrow.parquet.write_table(table, folder / f"train-{number:05}-of-{_FILES:05}.parquet", row_group_size=1_000)
    return folder


def random_images(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, 32, 32, 3) uint8 smooth noise, which compresses about as well as photographs, and labels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 224, (rows, PIXELS // 4, PIXELS // 4, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    images += rng.integers(0, 32, images.shape, dtype=np.uint8)
    return images, np.arange(rows) % CLASSES


def encode_jpeg(image: np.ndarray) -> bytes:
    """Return an image as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
