"""`rayprune audit`: score the samples, find what is probably wrong with them, and write it down.

<run>/audit.yaml       the config
<run>/fold_1/ …        the runs that score the samples, each a run folder of its own
<run>/duplicates/      the pass that compares the samples
<run>/audit.parquet    a row per training sample (`rayprune.sources.audit_files`)
<run>/audit_gallery/   pictures, or texts and numbers, of the samples to look at
<run>/audit.json       the noise rate, overall and for each pair of classes, and the numbers of samples in each group

Each part resumes as any run does, so that the same command continues an interrupted audit.

Shapes: N training samples, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.config import Config
from rayprune.core.audit.noise_model import confident_joint
from rayprune.core.audit.suspects import Evidence, Suspects, find_suspects
from rayprune.engine.storage.checkpoint import load_selector_state
from rayprune.engine.storage.resume import run_folder_of
from rayprune.engine.storage.run_folder import read_metrics, write_whole
from rayprune.engine.train.audit_gallery import write_audit_gallery
from rayprune.engine.train.driver import open_splits, train
from rayprune.errors import ConfigError
from rayprune.experiments.audit.duplicates import DuplicateScan, find_in_data
from rayprune.experiments.folder import ExperimentFolder
from rayprune.sources import SampleSource
from rayprune.sources.audit_files import AUDIT_NAME, AuditTable, write_audit

SUMMARY_NAME = "audit.json"
SUMMARY_SCHEMA = 1
_COLUMN = "table/column/"  # of a score table in a checkpoint
_OUTLIER = 6.0  # robust standard deviations from the samples of the same class
_EASY_VISITS, _EASY = 0.9, 0.95  # share of training visits that predict the label, and its probability out of fold
_MAX_PAIRS = 50


@dataclass(frozen=True)
class Audit:
    """A finished audit.

    Attributes:
        folder: with audit.parquet and audit.json.
        table: the findings.
        summary: the content of audit.json.
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
    folder = ExperimentFolder(run_folder_of(config), "audit.yaml", digest_of)
    with folder.open(config):
        runs = [train(config.auditing(number), debug=debug, **listeners) for number in range(config.audit.folds)]
        evidence = evidence_of(config, np.asarray(source.labels))
        scan = find_in_data(config, splits, debug=debug, **listeners) if config.audit.duplicates else None
        found = write_findings(config, source, evidence, scan, [result.folder for result in runs])
        write_audit_gallery(splits, found.table, found.folder)
        return found


def evidence_of(config: Config, labels: NDArray[np.integer[Any]]) -> Evidence:
    """Return what the finished runs of an audit have observed of samples with these labels, (N,)."""
    folders = [run_folder_of(config.auditing(number)) for number in range(config.audit.folds)]
    return Evidence.of_runs(labels.astype(np.int64), [_columns(folder) for folder in folders])


def digest_of(config: Config) -> str:
    """Return a short hash of the settings that affect an audit's results."""
    content = {"audit": config.audit.model_dump(mode="json"), "runs": config.auditing(0).identity()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def write_findings(
    config: Config, source: SampleSource, evidence: Evidence, scan: DuplicateScan | None, runs: list[Path]
) -> Audit:
    """Find the suspects and write audit.parquet and audit.json."""
    suspects = find_suspects(evidence, config.audit.rule, config.train.seed)
    table = table_of(evidence.labels, suspects, scan, config.audit.at, source.schema.class_names)
    folder = run_folder_of(config)
    summary = _summary(config, source, evidence, suspects, table, scan, runs)
    write_audit(folder / AUDIT_NAME, table, source.fingerprint, {"audit": config.audit.model_dump(mode="json")})
    write_whole(folder / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    return Audit(folder, table, summary)


def table_of(
    labels: NDArray[np.int64],
    suspects: Suspects,
    scan: DuplicateScan | None,
    at: float,
    class_names: tuple[str, ...] = (),
) -> AuditTable:
    """Return the findings on each sample.

    A sample is in the first group that fits: wrong_label, leak, duplicate, outlier, never_learned, easy.
    """
    num = labels.size
    wrong = suspects.p_wrong >= np.float32(at)
    statistics = dict(suspects.statistics)
    duplicate_of, split = np.full(num, -1, dtype=np.int64), np.full(num, "", dtype=object)
    groups: list[tuple[str, NDArray[np.bool_]]] = [("wrong_label", wrong)]
    if scan is not None:
        leaked, others = _duplicates(scan, num, duplicate_of, split)
        statistics |= {"similarity": scan.duplicates.similarity[:num], "outlier": scan.outlier[:num]}
        groups += [("leak", leaked), ("duplicate", others), ("outlier", scan.outlier[:num] >= _OUTLIER)]
    correct = statistics["correct"]
    groups += [
        ("never_learned", correct == 0),
        ("easy", (correct >= _EASY_VISITS) & (statistics["held_out_probability"] >= _EASY)),
    ]
    group = np.full(num, "", dtype=object)
    for name, rows in reversed(groups):
        group[rows] = name
    suggested = np.where(wrong, suspects.suggested, labels)
    evidence = _texts(labels, suspects, group, statistics, class_names)
    return AuditTable(labels, suspects.p_wrong, suggested, duplicate_of, split, group, evidence, statistics)


def _duplicates(
    scan: DuplicateScan, num: int, duplicate_of: NDArray[np.int64], split: NDArray[np.object_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Fill in the duplicate of each training sample; return masks of leaked samples, and of other duplicates."""
    found, total = scan.duplicates, scan.duplicates.of.size
    first = np.where(found.of >= 0, found.of, np.arange(total))  # of the sample's group
    validation = np.full(total, -1, dtype=np.int64)  # first id of a group → its lowest validation sample
    validation[first[num:][::-1]] = np.arange(num, total)[::-1]
    leaked = np.zeros(num, dtype=bool)
    leaked[found.leaked] = True
    duplicate_of[leaked], split[leaked] = validation[first[:num][leaked]] - num, "validation"
    others = (found.of[:num] >= 0) & ~leaked
    duplicate_of[others], split[others] = found.of[:num][others], "train"
    return leaked, others


def _texts(
    labels: NDArray[np.int64],
    suspects: Suspects,
    group: NDArray[np.object_],
    statistics: Mapping[str, NDArray[np.float32]],
    class_names: tuple[str, ...],
) -> NDArray[np.object_]:
    """Return a line on each sample in a group, (N,)."""

    def named(label: int) -> str:
        return class_names[label] if label < len(class_names) else str(label)

    texts = np.full(labels.size, "", dtype=object)
    for row in np.flatnonzero(group != ""):
        own, learned = statistics["held_out_probability"][row], statistics["correct"][row]
        if group[row] == "wrong_label":
            likely = named(int(suspects.suggested[row]))
            texts[row] = f"{named(int(labels[row]))} has probability {own:.2f} out of fold, {likely} is likely"
        elif group[row] in ("leak", "duplicate"):
            texts[row] = f"similarity {statistics['similarity'][row]:.3f}"
        elif group[row] == "outlier":
            texts[row] = f"{statistics['outlier'][row]:.1f} robust standard deviations from its class"
        else:
            texts[row] = f"predicted in {learned:.0%} of its training visits, {own:.2f} out of fold"
    return texts


def _summary(
    config: Config,
    source: SampleSource,
    evidence: Evidence,
    suspects: Suspects,
    table: AuditTable,
    scan: DuplicateScan | None,
    runs: list[Path],
) -> dict[str, Any]:
    """Return the content of audit.json."""
    num, model = len(table), suspects.model
    wrong = model.joint * (1.0 - np.eye(model.joint.shape[0]))
    given = np.bincount(table.label, minlength=model.joint.shape[0]) / num
    pairs = [np.unravel_index(flat, wrong.shape) for flat in np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]]
    names, counts = np.unique(table.group[table.group != ""].astype(str), return_counts=True)
    counted = confident_joint(evidence.held_out, evidence.labels)
    lines = [read_metrics(run) for run in runs]
    summary: dict[str, Any] = {
        "schema": SUMMARY_SCHEMA,
        "num_samples": num,
        "rule": config.audit.rule,
        "folds": config.audit.folds,
        "at": config.audit.at,
        "noise_rate": round(model.noise_rate, 6),
        "noise_rate_confident_joint": round(1.0 - float(np.trace(counted)), 6),
        "sharpness": round(model.sharpness, 4),
        "pairs": [
            {
                "label": int(label),
                "suggested": int(likely),
                "count": int(np.count_nonzero((table.label == label) & (table.suggested_label == likely))),
                "rate": round(float(wrong[label, likely] / given[label]), 6),
            }
            for label, likely in pairs
            if wrong[label, likely] * num >= 0.5
        ],
        "groups": {str(name): int(count) for name, count in zip(names, counts, strict=True)},
        "class_names": list(source.schema.class_names),
        "samples_trained": sum(metrics[-1]["samples_trained"] for metrics in lines if metrics),
        "seconds": round(sum(line["seconds"]["epoch"] for metrics in lines for line in metrics), 3),
    }
    if scan is not None:
        summary |= {"radius": scan.radius, "compared_by": scan.kind}
    return summary


def _columns(run: Path) -> dict[str, NDArray[Any]]:
    """Return the columns of a finished run's score table."""
    state = load_selector_state(run, read_metrics(run)[-1]["epoch"] + 1)
    return {name.removeprefix(_COLUMN): column for name, column in state.items() if name.startswith(_COLUMN)}
