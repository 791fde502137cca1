"""What an audit has found: a table and a summary of the suspects and the near-duplicates, and their files.

Shapes: N training samples, V validation samples, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.algorithms.near_duplicates import Duplicates
from rayprune.core.audit.noise_model import NoiseModel, confident_joint
from rayprune.core.audit.suspects import Evidence, Suspects, find_suspects
from rayprune.engine.storage.run_folder import write_whole
from rayprune.sources import SampleSource
from rayprune.sources.tables.audits import AUDIT_NAME, AuditTable, write_audit
from rayprune.sources.vectors import Kind

SUMMARY_NAME = "audit.json"
SUMMARY_SCHEMA = 1
# Who predicted a sample: networks that did not train on it, those that were training on it, or the trained one.
Predictions = Literal["out_of_fold", "training_visits", "trained_network"]
_PREDICTED: dict[Predictions, str] = {
    "out_of_fold": "out of fold",
    "training_visits": "in training",
    "trained_network": "after training on it",
}
_OUTLIER = 6.0  # robust standard deviations from the samples of the same class
_EASY_VISITS, _EASY = 0.9, 0.95  # share of training visits that predict the label, and its probability
_MAX_PAIRS = 50


@dataclass(frozen=True, eq=False)
class Compared:
    """Near-duplicates and outliers.

    Attributes:
        duplicates: the near-duplicates among N + V samples.
        outlier: (N + V,) float32, how far a sample is from others: a robust z-score in its class.
        kind: how the samples were compared.
    """

    duplicates: Duplicates
    outlier: NDArray[np.float32]
    kind: Kind

    @classmethod
    def of_columns(cls, columns: Mapping[str, NDArray[Any]], num_train: int, kind: Kind) -> Compared:
        """Return what the columns of `rayprune.core.audit.near_duplicates` hold, of N = `num_train` and V others."""
        duplicates = Duplicates(
            columns["duplicate_of"].astype(np.int64),
            columns["duplicate_split"].astype(np.int8),
            columns["duplicate_similarity"].astype(np.float32),
            num_train,
        )
        return cls(duplicates, columns["outlier"].astype(np.float32), kind)


@dataclass(frozen=True)
class AuditSettings:
    """How findings are made of the evidence.

    Attributes:
        predictions: whose predictions the evidence is from.
        class_names: for texts; may be empty.
        rule: how samples are ranked, a key of `rayprune.core.audit.suspects.RULES`.
        at: the probability from which on a label counts as a suspect.
        seed: of the draw of samples to fit, where there are very many.
    """

    predictions: Predictions = "out_of_fold"
    class_names: tuple[str, ...] = ()
    rule: str = "ensemble"
    at: float = 0.5
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Findings:
    """The findings of an audit.

    Attributes:
        table: of each sample, the content of audit.parquet.
        summary: the noise rate, overall and for each pair of classes, and the groups' sizes; the content of audit.json.
    """

    table: AuditTable
    summary: dict[str, Any]

    @classmethod
    def of(
        cls, evidence: Evidence, compared: Compared | None, settings: AuditSettings, source: SampleSource | None = None
    ) -> Findings:
        """Find the suspects, and return them with the near-duplicates and outliers, if these were looked for.

        A source gives the names of the samples' files.
        """
        suspects = find_suspects(evidence, settings.rule, settings.seed)
        table = table_of(evidence.labels, suspects, compared, settings)
        if source is not None and source.file_of(0) is not None:
            table = replace(
                table, file=np.array([source.file_of(sample) for sample in range(len(table))], dtype=object)
            )
        comparison = {} if compared is None else {"compared_by": compared.kind}
        return cls(table, _summary(evidence, suspects.model, table, settings) | comparison)

    def write(self, folder: Path, fingerprint: str, about: Mapping[str, Any]) -> None:
        """Write audit.parquet and audit.json into a run folder, with the data's fingerprint and facts of the audit."""
        write_audit(folder / AUDIT_NAME, self.table, fingerprint, {"audit": dict(about)})
        write_whole(folder / SUMMARY_NAME, json.dumps(self.summary, indent=1) + "\n")


def table_of(
    labels: NDArray[np.int64], suspects: Suspects, compared: Compared | None, settings: AuditSettings
) -> AuditTable:
    """Return the findings on each of N samples.

    A sample is in the first group that fits: wrong_label, leak, duplicate, outlier, never_learned, easy. Statistics
    that no sample has are left out.
    """
    num = labels.size
    wrong = suspects.p_wrong >= np.float32(settings.at)
    statistics = {name: values for name, values in suspects.statistics.items() if not np.isnan(values).all()}
    if settings.predictions != "out_of_fold":  # `probability` is the same then
        statistics = {name: values for name, values in statistics.items() if not name.startswith("held_out")}
    duplicate_of, split = np.full(num, -1, dtype=np.int64), np.full(num, "", dtype=object)
    groups: list[tuple[str, NDArray[np.bool_]]] = [("wrong_label", wrong)]
    if compared is not None:
        leaked, others = _duplicates(compared, num, duplicate_of, split)
        statistics |= {"similarity": compared.duplicates.similarity[:num], "outlier": compared.outlier[:num]}
        groups += [("leak", leaked), ("duplicate", others), ("outlier", compared.outlier[:num] >= _OUTLIER)]
    correct = suspects.statistics["correct"]
    groups += [
        ("never_learned", correct == 0),
        ("easy", (correct >= _EASY_VISITS) & (suspects.statistics["held_out_probability"] >= _EASY)),
    ]
    group = np.full(num, "", dtype=object)
    for name, rows in reversed(groups):
        group[rows] = name
    suggested = np.where(wrong, suspects.suggested, labels)
    table = AuditTable(labels, suspects.p_wrong, suggested, duplicate_of, split, group, statistics=statistics)
    return replace(table, evidence=_texts(table, suspects, settings))


def _duplicates(
    compared: Compared, num: int, duplicate_of: NDArray[np.int64], split: NDArray[np.object_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Fill in the duplicate of each training sample; return masks of leaked samples, and of other duplicates.

    Of several copies of a validation sample, the first one is a leak, and the others are its duplicates.
    """
    found, total = compared.duplicates, compared.duplicates.of.size
    first = np.where(found.of >= 0, found.of, np.arange(total))  # of the sample's group
    validation = np.full(total, -1, dtype=np.int64)  # first id of a group → its lowest validation sample
    validation[first[num:][::-1]] = np.arange(num, total)[::-1]
    others = found.of[:num] >= 0
    duplicate_of[others], split[others] = found.of[:num][others], "train"
    leaked = np.zeros(num, dtype=bool)
    leaked[found.leaked] = True
    leaked &= ~others
    duplicate_of[leaked], split[leaked] = validation[first[:num][leaked]] - num, "validation"
    return leaked, others


def _texts(table: AuditTable, suspects: Suspects, settings: AuditSettings) -> NDArray[np.object_]:
    """Return a line on each sample in a group, (N,)."""
    class_names, predicted = settings.class_names, _PREDICTED[settings.predictions]
    labels, group, statistics = table.label, table.group, table.statistics

    def named(label: int) -> str:
        return class_names[label] if label < len(class_names) else str(label)

    texts = np.full(labels.size, "", dtype=object)
    for row in np.flatnonzero(group != ""):
        own, learned = suspects.statistics["held_out_probability"][row], suspects.statistics["correct"][row]
        if group[row] == "wrong_label" and np.isnan(own):
            texts[row] = f"never visited, and {named(int(labels[row]))} is wrong more often than right"
        elif group[row] == "wrong_label":
            likely = named(int(suspects.suggested[row]))
            texts[row] = f"{named(int(labels[row]))} has probability {own:.2f} {predicted}, {likely} is likely"
        elif group[row] in ("leak", "duplicate"):
            texts[row] = f"similarity {statistics['similarity'][row]:.3f}"
            if group[row] == "duplicate" and labels[of := table.duplicate_of[row]] != labels[row]:
                texts[row] += f", but {of} is labeled {named(int(labels[of]))}"
        elif group[row] == "outlier":
            texts[row] = f"{statistics['outlier'][row]:.1f} robust standard deviations from its class"
        else:
            texts[row] = f"predicted in {learned:.0%} of its training visits, {own:.2f} {predicted}"
    return texts


def _summary(evidence: Evidence, model: NoiseModel, table: AuditTable, settings: AuditSettings) -> dict[str, Any]:
    num = len(table)
    wrong = model.joint * (1.0 - np.eye(model.joint.shape[0]))
    given = np.bincount(table.label, minlength=model.joint.shape[0]) / num
    pairs = [np.unravel_index(flat, wrong.shape) for flat in np.argsort(-wrong, axis=None, kind="stable")[:_MAX_PAIRS]]
    names, counts = np.unique(table.group[table.group != ""].astype(str), return_counts=True)
    known = evidence.predicted
    held_out, labels = evidence.held_out[known], evidence.labels[known]
    accuracy = float(np.mean(held_out.argmax(axis=1) == labels))
    counted = confident_joint(held_out, labels)
    copies = np.flatnonzero(table.duplicate_split == "train")
    return {
        "schema": SUMMARY_SCHEMA,
        "num_samples": num,
        "rule": settings.rule,
        "predictions": settings.predictions,
        "at": settings.at,
        "noise_rate": round(model.noise_rate, 6),
        "noise_rate_confident_joint": round(1.0 - float(np.trace(counted)), 6),
        "sharpness": round(model.sharpness, 4),
        "accuracy": round(accuracy, 6),
        "is_weak": model.is_weak,
        "conflicts": int(np.count_nonzero(table.label[copies] != table.label[table.duplicate_of[copies]])),
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
        "class_names": list(settings.class_names),
    }
