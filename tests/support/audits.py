"""A small data set with known errors, and the config of its audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rayprune.config import Config
from rayprune.config.yaml import merge
from rayprune.sources import open_data
from tests.support.runs import run_config

# Ids of training samples, and what each is a copy of: training samples, and a validation sample.
COPIES, ORIGINALS = (600, 601, 602), (10, 11, 12)
LEAK, LEAKED = 603, 5


@dataclass(frozen=True)
class NoisyDigits:
    """600 digits and four copies; a fifth of the labels is wrong.

    Attributes:
        path: an .npz file for the source `arrays`.
        true: (604,) the right labels.
        wrong: (604,) mask of wrong labels.
    """

    path: Path
    true: np.ndarray
    wrong: np.ndarray


def noisy_digits(folder: Path) -> NoisyDigits:
    """Write the data set into a folder."""
    rows = open_data("digits").train.take(np.arange(700))
    images, labels, rng = rows["image"], rows["label"], np.random.default_rng(0)
    chosen = np.r_[:600, ORIGINALS, 600 + LEAKED]
    true, wrong = labels[chosen], rng.random(604) < 0.2
    given = np.where(wrong, (true + rng.integers(1, 10, 604)) % 10, true)
    path = folder / "digits.npz"
    np.savez(path, x_train=images[chosen], y_train=given, x_test=images[600:700], y_test=labels[600:700])
    return NoisyDigits(path, true, wrong)


def audit_config(path: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    """Return the config of a short audit of an .npz file."""
    short = {
        "data": {"source": "arrays", "path": str(path), "limit": None},
        "train": {"epochs": 12},
        "optim": {"lr": 0.1},
        "audit": {"folds": 3, "window": 3},
    }
    return run_config(folder, "audit", **merge(short, sections))
