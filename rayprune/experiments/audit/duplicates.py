"""Near-duplicates and outliers in the data of a run, by one forward-only pass over training and validation data.

<run>/duplicates/    the pass, a run folder of its own; its scores.parquet has a row per sample: training samples first

The pass is a run like any other: with workers, Ray Data streams the samples; it resumes after an interruption, and a
finished one is only read. Images are compared by `rayprune.nn.descriptors`, features by standardized differences, texts
and token ids by hashed n-grams.
"""

from __future__ import annotations

from typing import Any

from rayprune.config import Config
from rayprune.config.config import make_config
from rayprune.core.audit.near_duplicates import settings_of
from rayprune.engine.storage.audit_findings import Compared
from rayprune.engine.storage.resume import run_folder_of
from rayprune.engine.train.driver import Listeners, forward_pass
from rayprune.sources.base import Splits
from rayprune.sources.tables.scores import read_scores
from rayprune.sources.vectors import Kind, VectorView
from rayprune.sources.views import Concatenated

FOLDER = "duplicates"

_METHOD = "rayprune.core.audit.near_duplicates:NearDuplicates"
_EMBEDDER = "rayprune.nn.descriptors:embedder"
_MODEL = "rayprune.nn.descriptors:placeholder"


def find_in_data(
    config: Config, splits: Splits, *, radius: float | None = None, debug: bool = False, **listeners: Any
) -> Compared:
    """Find near-duplicates and outliers in training and validation data.

    Args:
        config: of a run, with `run.name` set; its data, scaling and run sections count.
        splits: the data. Any columns will do: an image, texts, token ids, or numbers.
        radius: the largest distance of near-duplicates; by default that of `rayprune.core.audit.near_duplicates`.
        debug: show Ray's own logs.
        **listeners: on_epoch, on_progress, on_start, on_notice, pause, as for `train`.

    Raises:
        ConfigError, DataError: the data cannot be compared.
        RunFolderError: the folder holds a pass over other data, or with another radius.
        TrainingPaused, TrainingFailed, KeyboardInterrupt: as for `train`.
    """
    both = splits.train if splits.validation is None else Concatenated(splits.train, splits.validation)
    view, num_train = VectorView(both), len(splits.train)
    scan = scan_config(config, view.kind, num_train, radius)
    folder = forward_pass(scan, Splits(view, None), Listeners(**listeners), debug=debug)
    columns = read_scores(folder / "scores.parquet").scores
    return Compared.of_columns(columns, num_train, view.kind)


def scan_config(config: Config, kind: Kind, num_train: int, radius: float | None = None) -> Config:
    """Return the config of the pass."""
    tree = config.model_dump(mode="json", include={"data", "scaling", "run"})
    tree["data"]["augment"] = {"crop": 0, "flip": False}
    tree["run"] |= {"storage_path": str(run_folder_of(config)), "name": FOLDER, "resume": "auto", "trackers": []}
    train = {"epochs": 1, "precision": "fp32", "seed": config.train.seed, "batch_size": config.train.batch_size}
    method = {"name": _METHOD, **settings_of(kind, num_train, radius)}
    collect = {"embedder": _EMBEDDER}
    return make_config(tree | {"model": {"name": _MODEL}, "method": method, "train": train, "collect": collect})
