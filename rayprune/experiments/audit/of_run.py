"""`rayprune audit RUN`: audit the data of a finished run by what it has observed, without training.

The final network predicts all training samples, and scores.parquet may have the dynamics of their training visits. The
network has trained on the labels, so that it may have memorized wrong ones: `rayprune audit CONFIG` sees more. For
samples that the run has never trained on, as those that a static subset leaves out, the predictions are as good.

Everything is written into the run's folder, as `rayprune.experiments.audit.runner` describes.

Shapes: N training samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.config.code import Trust
from rayprune.core.audit.suspects import Evidence
from rayprune.engine.storage.lock import lock_folder
from rayprune.engine.storage.resume import check_folder, finished_folder, run_folder_of
from rayprune.engine.storage.stored_config import read_trusted
from rayprune.engine.train.driver import open_splits
from rayprune.engine.train.predictions import final_predictions
from rayprune.engine.train.preflight import input_spec
from rayprune.errors import ConfigError, RunFolderError
from rayprune.experiments.audit.duplicates import find_in_data
from rayprune.experiments.audit.runner import Audit, write_findings
from rayprune.sources import SampleSource
from rayprune.sources.tables.scores import read_scores

_BATCH = 256
_KINDS = {"audit.yaml": "an audit of its own", "sweep.yaml": "a sweep", "compare.yaml": "a comparison"}


def run_config(folder: Path, overrides: Iterable[str] = (), trust: Trust = False) -> Config:
    """Return the config of a run where its folder now is, with keys of `audit`, `scaling` or `data.path` laid over it.

    Args:
        folder: the run folder.
        overrides: `key.sub=value` words.
        trust: run the code that the config names: True, or the digest of the code that you have read.

    Raises:
        ConfigError: an override is wrong, or changes the run's result; or the config names code that is not trusted.
        RunFolderError: the folder holds no run of `rayprune train`.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        holds = next((kind for name, kind in _KINDS.items() if (folder / name).exists()), None)
        reason = f"holds {holds}" if holds else "is not a run folder (it has no config.yaml)"
        raise RunFolderError(f"{folder} {reason}: name the folder of a finished run, such as runs/NAME, or a config")
    if (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").is_dir():
        raise RunFolderError(
            f"{folder} is the run of a loop of your own, whose network is not in it: call shard.audit() in the loop"
        )
    place = folder.expanduser().resolve()
    own = {"storage_path": str(place.parent), "name": place.name, "resume": "auto"}
    return read_trusted(file, overrides, trust, run=own)


def audit_run(
    config: Config, *, debug: bool = False, on_progress: Callable[[int, int, int], None] | None = None, **listeners: Any
) -> Audit:
    """Audit the training data of a finished run.

    Args:
        config: of `run_config`.
        debug, on_progress, **listeners: as for `rayprune.engine.train.driver.train`.

    Raises:
        ConfigError: the data have fewer than two classes, or `audit.rule` needs what the run has not recorded.
        RunFolderError: the run is not finished, is of other data, or another process uses its folder.
    """
    check_folder(config)
    splits = open_splits(config)
    source = splits.train
    if (source.schema.num_classes or 0) < 2:
        raise ConfigError("an audit needs labels of at least two classes: samples have one class or none")
    place = run_folder_of(config)
    with lock_folder(place):
        folder = finished_folder(config, source)
        if folder is None:
            raise RunFolderError(f"{place} is not finished: continue it first, rayprune train {place}/config.yaml")
        source.prepare()
        progress = None if on_progress is None else lambda done: on_progress(0, done, len(source))
        evidence = _evidence(config, source, folder, progress)
        scan = None
        if config.audit.duplicates:
            scan = find_in_data(config, splits, debug=debug, on_progress=on_progress, **listeners)
        return write_findings(config, splits, evidence, scan, "trained_network")


def _evidence(config: Config, source: SampleSource, folder: Path, on_batch: Callable[[int], None] | None) -> Evidence:
    """Return the final network's predictions, and what the run has recorded of its training visits."""
    ids, spec = np.arange(len(source)), input_spec(config, source)
    device = torch.device("cuda" if torch.cuda.is_available() and config.scaling.use_gpu is not False else "cpu")
    probs_NC = final_predictions(
        config, source, spec, folder, ids, device=device, batch_size=_BATCH, on_batch=on_batch
    ).astype(np.float32)
    scores = read_scores(folder).scores
    dynamics = [_column(scores, ids.size, *names) for names in (("loss_mean", "loss"), ("logit_margin_mean",))]
    losses, margins = (column[None] for column in dynamics)
    labels = np.asarray(source.labels, dtype=np.int64)
    return Evidence(labels, probs_NC, probs_NC, losses, margins, _column(scores, ids.size, "correct_mean"))


def _column(scores: Mapping[str, NDArray[Any]], num: int, *names: str) -> NDArray[np.float32]:
    """Return the first of the columns that there is, (N,); NaN without any."""
    found = next((scores[name] for name in names if name in scores), np.full(num, np.nan))
    return np.asarray(found, dtype=np.float32)
