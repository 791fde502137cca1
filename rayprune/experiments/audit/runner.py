"""`rayprune audit`: score the samples, find what is probably wrong with them, and write it down.

<run>/audit.yaml       the config
<run>/fold_1/ …        the runs that score the samples, each a run folder of its own
<run>/duplicates/      the pass that compares the samples
<run>/audit.parquet    a row per training sample (`rayprune.sources.tables.audits`)
<run>/audit_gallery/   pictures, or texts and numbers, of the samples to look at
<run>/audit.json       the noise rate, overall and for each pair of classes, and the numbers of samples in each group

Each part resumes as any run does, so that the same command continues an interrupted audit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.config.config import THRESHOLD_SAMPLES
from rayprune.core.audit.suspects import Evidence
from rayprune.core.audit.threshold_samples import (
    draw_threshold_samples,
    rate_by_threshold_samples,
    without_threshold_samples,
)
from rayprune.engine.storage.audit_findings import AuditSettings, Compared, Findings, Predictions
from rayprune.engine.storage.checkpoint import load_selector_state
from rayprune.engine.storage.resume import run_folder_of
from rayprune.engine.storage.run_folder import read_metrics
from rayprune.engine.train.audit_gallery import write_audit_gallery
from rayprune.engine.train.driver import RunResult, open_splits, train
from rayprune.errors import ConfigError
from rayprune.experiments.audit.duplicates import find_in_data
from rayprune.experiments.folder import ExperimentFolder
from rayprune.sources import Splits
from rayprune.sources.tables.audits import AuditTable

_COLUMN = "table/column/"  # of a score table in a checkpoint


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        folder: with audit.parquet and audit.json.
        table, summary: their contents.
    """

    folder: Path
    table: AuditTable
    summary: dict[str, Any]


def audit(config: Config, *, debug: bool = False, **listeners: Any) -> Audit:
    """Audit the training data of a config.

    Args:
        config: a resolved config, with `run.name` set; its `method` does not count.
        debug, **listeners: as for `rayprune.engine.train.driver.train`.

    Raises:
        ConfigError: the data have fewer than two classes, or a setting is wrong. Other errors are those of `train`.
    """
    splits = open_splits(config)
    source = splits.train
    if (source.schema.num_classes or 0) < 2:
        raise ConfigError("an audit needs labels of at least two classes: samples have one class or none")
    if len(source) < config.audit.folds:
        raise ConfigError(f"audit.folds = {config.audit.folds}: there are {len(source)} samples, use fewer folds")
    if config.audit.threshold_samples and config.audit.folds == 1:
        raise ConfigError("audit.threshold_samples: a run says nothing of its own threshold samples, use more folds")
    folder = ExperimentFolder(run_folder_of(config), "audit.yaml", digest_of)
    with folder.open(config):
        runs = [train(run, debug=debug, **listeners) for run in _run_configs(config)]
        evidence = evidence_of(config, np.asarray(source.labels))
        scan = find_in_data(config, splits, debug=debug, **listeners) if config.audit.duplicates else None
        predictions: Predictions = "out_of_fold" if config.audit.folds > 1 else "training_visits"
        facts = _cost(config, runs)
        if config.audit.threshold_samples:
            facts["noise_rate_threshold_samples"] = round(rate_by_threshold_samples(evidence.margins), 6)
        return write_findings(config, splits, evidence, scan, predictions, **facts)


def evidence_of(config: Config, labels: NDArray[np.integer[Any]]) -> Evidence:
    """Return what the finished runs of an audit have observed of samples with these labels, (N,)."""
    return Evidence.of_runs(labels.astype(np.int64), map(_columns, _run_configs(config)))


def _run_configs(config: Config) -> list[Config]:
    return [config.auditing(number) for number in range(config.audit.folds * config.audit.repeats)]


def digest_of(config: Config) -> str:
    """Return a short hash of the settings that affect an audit's runs; others only affect what is made of them."""
    content = {
        "audit": config.audit.model_dump(mode="json", exclude={"rule", "at", "duplicates"}),
        "runs": config.auditing().identity(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def write_findings(
    config: Config,
    splits: Splits,
    evidence: Evidence,
    compared: Compared | None,
    predictions: Predictions,
    **facts: Any,
) -> Audit:
    """Find the suspects, and write audit.parquet, audit.json, which also gets the facts, and the gallery."""
    folder, audit = run_folder_of(config), config.audit
    settings = AuditSettings(predictions, splits.train.schema.class_names, audit.rule, audit.at, config.train.seed)
    found = Findings.of(evidence, compared, settings, splits.train)
    found.summary.update(facts)
    found.write(folder, splits.train.fingerprint, audit.model_dump(mode="json"))
    write_audit_gallery(splits, found.table, folder)
    return Audit(folder, found.table, found.summary)


def _cost(config: Config, runs: list[RunResult]) -> dict[str, Any]:
    lines = [line for run in runs for line in run.metrics]
    return {
        "folds": config.audit.folds,
        "repeats": config.audit.repeats,
        "samples_trained": sum(run.metrics[-1]["samples_trained"] for run in runs),
        "seconds": round(sum(line["seconds"]["epoch"] for line in lines), 3),
    }


def _columns(run: Config) -> dict[str, NDArray[Any]]:
    """Return what a finished run's score table has of the data's classes."""
    folder = run_folder_of(run)
    state = load_selector_state(folder, read_metrics(folder)[-1]["epoch"] + 1)
    columns = {name.removeprefix(_COLUMN): column for name, column in state.items() if name.startswith(_COLUMN)}
    if run.data.source != THRESHOLD_SAMPLES:
        return columns
    num_samples, num_classes = columns["probs"].shape
    draw = {name: run.data.source_keys[name] for name in ("seed", "number")}
    return without_threshold_samples(columns, draw_threshold_samples(num_samples, num_classes - 1, **draw))
