"""scikit-learn's handwritten digits: 1,797 gray 8×8 images that come with the package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rayprune.sources.base import Schema, Splits
from rayprune.sources.fingerprint import digest
from rayprune.sources.memory import RowSource
from rayprune.sources.registry import register_source
from rayprune.sources.views import holdout

NUM_SAMPLES = 1797
NUM_VALIDATION = 360


@register_source("digits")
@dataclass(frozen=True)
class Digits:
    """The digits as (8, 8, 1) uint8 images, their 17 gray levels scaled by 15 to 0..240.

    The split is fixed and stratified: 1,437 samples train and 360 validate. Both parts keep scikit-learn's order.
    """

    default_augment: ClassVar[dict[str, Any]] = {"crop": 1, "flip": False}

    def open(self) -> Splits:
        """Return the fixed split."""
        arrays = load_arrays()
        schema = Schema.for_classification("image", (8, 8, 1), 10, "0123456789")
        fingerprint = digest("digits", arrays["image"], arrays["label"])
        whole = RowSource(load_arrays, schema, fingerprint, arrays["label"])
        return holdout(whole, NUM_VALIDATION / NUM_SAMPLES)


def load_arrays() -> dict[str, np.ndarray]:
    """Return all digits in scikit-learn's order: image (1797, 8, 8, 1) uint8 and label (1797,) int64."""
    table = _table()
    images = (table[:, :64].reshape(-1, 8, 8, 1) * 15).astype(np.uint8)
    return {"image": images, "label": table[:, 64].astype(np.int64)}


def _table() -> np.ndarray:
    """Return (1797, 65) float64: 64 gray levels of 0..16 and the label."""
    # Read the file inside the package: importing scikit-learn takes longer than an epoch of training on the digits.
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels])
