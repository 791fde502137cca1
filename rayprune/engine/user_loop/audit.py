"""`shard.audit()` and `pruned.audit()`: what a loop's own training visits say about its data.

Shapes: N samples, B batch, C classes.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayprune.core.audit.near_duplicates import NearDuplicates, settings_of
from rayprune.core.audit.suspects import RULES
from rayprune.core.method import EpochContext
from rayprune.core.references import closest
from rayprune.core.table import ScoreTable
from rayprune.core.vectors import Vectors
from rayprune.engine.scoring.client import LoopClient
from rayprune.engine.storage.audit_findings import AuditSettings, Compared, Findings
from rayprune.errors import ConfigError, DataError, UsageError, one_line
from rayprune.nn.augment import Augment
from rayprune.nn.descriptors import image_descriptor
from rayprune.sources import SampleSource
from rayprune.sources.tables.audits import AuditTable
from rayprune.sources.vectors import VectorView

logger = logging.getLogger(__name__)

_ROWS = 1_024  # that are read and compared at a time


def audit_loop(
    client: LoopClient, source: SampleSource | None, *, rule: str, at: float, duplicates: bool, write: bool
) -> AuditTable:
    """Return the findings on a loop's data.

    Args:
        client: of the loop's scores.
        source: its data, if this process can read them.
        rule, at: as `audit.rule` and `audit.at` of a config.
        duplicates: whether to look for near-duplicates and outliers.
        write: write audit.parquet and audit.json into the run folder, if there is one.

    Raises:
        UsageError: the loop was not given audit=True.
        ConfigError: an argument is wrong, nothing was observed, or other labels than those of the data.
        DataError: the data cannot be compared.
    """
    if rule not in RULES:
        raise ConfigError(f"audit got rule {rule!r}: {closest(rule, RULES)}")
    if not 0 < at < 1:
        raise ConfigError(f"audit got at={at!r}: give a probability in (0, 1)")
    record = client.audit_record()
    if record is None:
        raise UsageError("nothing was recorded for an audit: give local_loader, or prune, audit=True")
    evidence = record.visits.evidence(record.labels)
    compared = compare(source, record.labels, record.seed) if duplicates and source is not None else None
    settings = AuditSettings("training_visits", record.class_names, rule, at, record.seed)
    found = Findings.of(evidence, compared, settings, source)
    if write and record.run_folder is not None:
        found.write(record.run_folder, record.fingerprint, {"rule": rule, "at": at})
    return found.table


def compare(source: SampleSource, labels: NDArray[np.int64], seed: int = 0) -> Compared | None:
    """Find near-duplicates and outliers by reading all samples in this process; None without anything to compare.

    Raises:
        DataError: the samples cannot be compared.
    """
    try:
        view = VectorView(source)
    except DataError as error:
        logger.info("no search for near-duplicates: %s", error)
        return None
    num = len(view)
    method = NearDuplicates(**settings_of(view.kind, num))
    vectors = Vectors("descriptor", num, method.storage)
    try:
        for start in range(0, num, _ROWS):
            ids = np.arange(start, min(start + _ROWS, num))
            vectors.put(ids, _described(view.kind, view.take(ids)[view.schema.input]))
        columns = method.condense_embeddings(vectors.array, ScoreTable(0, {}, 1), EpochContext(0, 1, num, seed, labels))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the samples can't be compared ({one_line(error)[:200]}): correct them, or call audit(duplicates=False)"
        ) from None
    return Compared.of_columns(columns, num, view.kind)


def _described(kind: str, rows: NDArray[Any]) -> NDArray[np.float32]:
    if kind != "image":  # a missing number of a table is 0, as it would make every vector NaN
        return np.nan_to_num(rows.astype(np.float32, copy=False), nan=0.0, posinf=0.0, neginf=0.0)
    with torch.inference_mode():
        images = Augment().evaluate(torch.from_numpy(np.require(rows, requirements=["C", "W"])))
        return image_descriptor(images).numpy()


def check_audited(logits: Tensor | None, targets: Tensor | None) -> None:
    """Refuse outputs from which no class of a sample can be learned.

    Raises:
        ConfigError: logits or targets are missing, or are not of one class per sample.
    """
    if logits is None:
        raise ConfigError("audit=True needs the logits of each batch: call weigh(batch, losses, logits=logits)")
    if targets is None:
        raise ConfigError("audit=True needs the labels: give weigh(targets=), or a batch with a column 'label'")
    if logits.ndim != 2 or logits.shape[1] < 2 or targets.ndim != 1 or targets.is_floating_point():
        raise ConfigError(
            "audit=True is for one of several classes per sample, logits (B, C) and integer targets (B,), got "
            f"{tuple(logits.shape)} and {targets.dtype} {tuple(targets.shape)}: leave audit out"
        )
