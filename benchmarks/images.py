"""CIFAR-10's images for the benchmarks that train: the real ones where RAYPRUNE_CIFAR10 names their folder.

The folder holds Parquet files as the Hugging Face hub has them: a column of encoded images, one of labels. Without it,
random images of the same size in the same layout, JPEG-encoded, stand in: what is timed does not depend on what they
show, except that InfoBatch finds other samples well learned. The names of the rows say which were used.
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
    """Where the images lie.

    Attributes:
        folder: of the Parquet files.
        name: for the names of rows.
    """

    folder: Path
    name: str

    def keys(self, cache_dir: Path) -> dict[str, object]:
        """Return the config's `data` section without a limit: crop and flip, no validation part."""
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
    """Return the real images, or write `rows` random ones below `scratch`."""
    if given := os.environ.get(VARIABLE):
        return Images(Path(given), "CIFAR-10")
    return Images(write_random(scratch, rows), "random images")


def write_random(scratch: Path, rows: int) -> Path:
    """Write random images as Parquet files below `scratch`; return their folder."""
    folder = scratch / "random-images"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = random_images(rows)
    for number, part in enumerate(np.array_split(rng.permutation(rows), _FILES)):
        stored = [{"bytes": encoded(images[row]), "path": None} for row in part]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"img": pa.array(stored, kind), "label": pa.array(labels[part], pa.int64())})
        pyarrow.parquet.write_table(table, folder / f"train-{number:05}-of-{_FILES:05}.parquet", row_group_size=1_000)
    return folder


def random_images(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, 32, 32, 3) uint8 smooth noise that compresses about as photographs do, and labels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 224, (rows, PIXELS // 4, PIXELS // 4, 3), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    images += rng.integers(0, 32, images.shape, dtype=np.uint8)
    return images, np.arange(rows) % CLASSES


def encoded(image: np.ndarray) -> bytes:
    """Return an image as JPEG, as the hub has them."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
