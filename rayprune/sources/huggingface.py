"""Data sets of the Hugging Face library `datasets`: a folder that it has saved, or a Dataset in Python.

Only folders of `save_to_disk` are read, by `load_from_disk`: nothing is ever downloaded. Images are decoded by this
package, so that both ways of storing them give the same pixels.

Shapes: N samples, B batch, H height, W width, C channels, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rayprune.core.objects import closest
from rayprune.sources.base import SampleSource, Splits
from rayprune.sources.decoded import check_mode, decoded
from rayprune.sources.encoded import check_size
from rayprune.sources.huggingface_columns import Columns
from rayprune.sources.huggingface_rows import DatasetRows, open_rows
from rayprune.sources.registry import register_source
from rayprune.sources.views import holdout

VALIDATION_SPLITS = ("validation", "valid", "val", "test")
HOLDOUT_SEED = 0


@register_source("huggingface")
@dataclass(frozen=True)
class HuggingFace:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Attributes:
        path: the folder.
        train_split: of a DatasetDict; a Dataset has none and is for training as a whole.
        validation_split: default: the first of validation, valid, val and test that is there; "" for none.
        image_column: of type Image, binary or a struct with `bytes`; default: found by name and type.
        label_column: ClassLabel, integers or strings; default: found by name, else the only ClassLabel or integer one.
        feature_columns: numbers, or lists of equally many numbers, in this order; default where there is no image: all
            but the label.
        image_size: pixels that the shorter side is scaled to, before the middle square is cut out; default: as stored.
        validation_fraction: held out, stratified, where there is no validation split; 0 for no validation.
        num_classes: default: the number of class names, else the largest training label + 1.
        cache: see `decoded.decoded`.
        cache_dir: see `cache.cache_root`.
    """

    path: str
    train_split: str = "train"
    validation_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    feature_columns: tuple[str, ...] | None = None
    image_size: int | None = None
    validation_fraction: float = 0.1
    num_classes: int | None = None
    cache: str = "auto"
    cache_dir: str | None = None
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": False}

    def __post_init__(self) -> None:
        check_mode(self.cache)
        check_size(self.image_size)
        if self.feature_columns == ():
            raise ValueError("data.feature_columns = []: name at least one column, or leave it out for all")

    def open(self) -> Splits:
        """Find the splits and columns and read the labels.

        Raises:
            ValueError: the package is not installed, the folder is no saved data set or damaged, or a split or column
                is missing or unsuitable.
        """
        folder = _folder(self.path)
        rows = DatasetRows(str(folder), None)
        splits = rows.split_names()
        validation = None
        if splits:
            if self.train_split not in splits:
                raise ValueError(
                    f"data.train_split {self.train_split!r} is not in {folder}: {closest(self.train_split, splits)}"
                )
            rows = replace(rows, split=self.train_split)
            validation = self._validation(folder, splits)
        columns = Columns(self.image_column, self.label_column, self.feature_columns, self.image_size)
        train = open_rows(rows, columns, self.num_classes)
        if validation is not None:
            held = open_rows(replace(rows, split=validation), columns, None, like=train)
            return Splits(self._decoded(train), self._decoded(held))
        if self.validation_fraction == 0:
            return Splits(self._decoded(train), None)
        return holdout(self._decoded(train), self.validation_fraction, HOLDOUT_SEED)

    def _validation(self, folder: Path, splits: tuple[str, ...]) -> str | None:
        others = [name for name in splits if name != self.train_split]
        if self.validation_split is None:
            return next((name for name in VALIDATION_SPLITS if name in others), None)
        if self.validation_split and self.validation_split not in others:
            name = self.validation_split
            raise ValueError(f"data.validation_split {name!r} is not in {folder}: {closest(name, others)}")
        return self.validation_split or None

    def _decoded(self, source: SampleSource) -> SampleSource:
        return decoded(source, self.cache, self.cache_dir)


def from_huggingface(
    dataset: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    feature_columns: tuple[str, ...] | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    cache: str = "none",
    cache_dir: str | None = None,
) -> SampleSource:
    """Return the samples of a `datasets.Dataset`; one that lies on disk pickles into its paths, others with their data.

    Args:
        dataset: the Dataset; its own format and transform are left aside.
        image_column, label_column, feature_columns, image_size, num_classes, cache, cache_dir: as in HuggingFace.

    Raises:
        ValueError: it is no Dataset, or a column is missing or unsuitable.
    """
    check_size(image_size)
    if not all(hasattr(dataset, name) for name in ("with_format", "features", "__len__")) or hasattr(dataset, "keys"):
        raise ValueError(
            f"{type(dataset).__name__} is no datasets.Dataset: choose a split, as in dataset['train'], "
            "and do not stream it"
        )
    columns = Columns(image_column, label_column, feature_columns, image_size)
    return decoded(open_rows(DatasetRows(None, None, dataset), columns, num_classes), cache, cache_dir)


def _folder(path: str) -> Path:
    if "://" in path:
        raise ValueError(f"data.path {path!r} is a URI: copy the folder to a local disk, or store Parquet files")
    folder = Path(path).expanduser().absolute()
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        other = ", or set data.source=parquet" if any(folder.glob("**/*.parquet")) else ""
        raise ValueError(f"data.path {path!r} is no folder written by Dataset.save_to_disk: correct it{other}")
    return folder
