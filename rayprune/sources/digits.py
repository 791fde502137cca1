"""scikit-learn's handwritten digits: 1,797 grey 8×8 images that need no network."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rayprune.sources.base import Column, Schema, Splits, holdout
from rayprune.sources.fingerprint import digest
from rayprune.sources.memory import RowSource
from rayprune.sources.registry import register_source

NUM_SAMPLES = 1797
NUM_VALIDATION = 360
SPLIT_SEED = 0


@register_source("digits")
@dataclass(frozen=True)
class Digits:
    """The digits as (8, 8, 1) uint8 images, their 17 grey levels scaled by 15 to 0..240.

    The split is fixed and stratified, 1,437 for training and 360 for validation; both parts keep scikit-learn's order.
    """

    default_augment: ClassVar[dict[str, Any]] = {"crop": 1, "flip": False}

    def open(self) -> Splits:
        """Return the fixed split."""
        arrays = load_arrays()
        schema = Schema(
            columns={"image": Column((8, 8, 1), "uint8"), "label": Column((), "int64")},
            input="image",
            num_classes=10,
            class_names=tuple("0123456789"),
        )
        fingerprint = digest("digits", arrays["image"], arrays["label"])
        whole = RowSource(load_arrays, schema, fingerprint, arrays["label"])
        return holdout(whole, NUM_VALIDATION / NUM_SAMPLES, SPLIT_SEED)


def load_arrays() -> dict[str, np.ndarray]:
    """Return all digits in scikit-learn's order: image (1797, 8, 8, 1) uint8 and label (1797,) int64."""
    table = _table()
    images = (table[:, :64].reshape(-1, 8, 8, 1) * 15).astype(np.uint8)
    return {"image": images, "label": table[:, 64].astype(np.int64)}


def _table() -> np.ndarray:
    """Return (1797, 65) float64: 64 grey levels of 0..16 and the label."""
    # From the file in the package: importing scikit-learn takes every process longer than a training epoch here.
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels])
