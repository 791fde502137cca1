"""audit_gallery/: pictures of the samples that an audit found, for the report, which then needs no data.

    gallery.json          the samples of each group, the most certain first, with labels and evidence
    <id>.png              a thumbnail of a training sample, if the inputs are images of one or three channels
    validation-<id>.png   of a validation sample, of which a training sample is a duplicate

Other inputs get a short text: their first values, or the start of a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rayprune.engine.storage.run_folder import RUN_SCHEMA
from rayprune.engine.train.gallery import write_thumbnails
from rayprune.paths import replace_folder
from rayprune.sources import SampleSource, Splits
from rayprune.sources.tables.audits import GROUPS, AuditTable

FOLDER = "audit_gallery"
PICTURES_OF_A_GROUP = 60
_MAX_VALUES, _MAX_CHARACTERS = 8, 160  # of a sample that is no image


def write_audit_gallery(splits: Splits, table: AuditTable, folder: Path) -> Path:
    """Write the gallery of an audit, in place of an earlier one.

    Args:
        splits: the audited data.
        table: the findings on the training part.
        folder: the run's folder.

    Returns:
        The gallery's folder.
    """
    target = folder / FOLDER
    groups = {group: _most_certain(table, group) for group in GROUPS}
    shown = {"train": sorted({sample for ids in groups.values() for sample in ids}), "validation": list[int]()}
    for sample in shown["train"].copy():
        if split := table.duplicate_split[sample]:
            shown[split].append(int(table.duplicate_of[sample]))
    samples = {}
    with replace_folder(target, last="gallery.json") as partial:
        for split, source in splits.by_name.items():
            ids = sorted({sample for sample in shown[split] if sample < len(source)})
            samples[split] = _samples(source, ids, partial, "" if split == "train" else f"{split}-")
        entries = {
            group: [_entry(table, samples, splits.train, sample) for sample in ids] for group, ids in groups.items()
        }
        content = {"schema": RUN_SCHEMA, "groups": entries}
        (partial / "gallery.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


def _most_certain(table: AuditTable, group: str) -> list[int]:
    """Return the samples of a group to show: by probability of a wrong label, outliers by their statistic."""
    ids = np.flatnonzero(table.group == group)
    by = table.statistics.get("outlier", table.p_wrong) if group == "outlier" else table.p_wrong
    order = np.argsort(-np.nan_to_num(by[ids].astype(np.float64), nan=-np.inf), kind="stable")
    most = PICTURES_OF_A_GROUP // 2 if group in ("duplicate", "leak") else PICTURES_OF_A_GROUP  # pictures are pairs
    return [int(sample) for sample in ids[order][:most]]


def _samples(source: SampleSource, ids: list[int], folder: Path, prefix: str) -> dict[int, dict[str, Any]]:
    """Return id → id, label, class name, and the sample's thumbnail or its content in words."""
    if not ids:
        return {}
    images = write_thumbnails(source, ids, folder, prefix)
    texts: dict[int, str] = {}
    if not images:
        rows = source.take(np.array(ids, dtype=np.int64))[_shown_column(source)]
        texts = {sample: _in_words(row) for sample, row in zip(ids, rows, strict=True)}
    labels = source.labels
    return {
        sample: {
            "id": sample,
            "label": int(labels[sample]),
            "label_name": _class_name(source, int(labels[sample])),
            "image": images.get(sample),
            "text": texts.get(sample),
            "file": source.file_of(sample),
        }
        for sample in ids
    }


def _shown_column(source: SampleSource) -> str:
    """Return the column of text, if there is one besides the inputs; else that of the inputs."""
    columns = source.schema.columns
    return next((name for name, column in columns.items() if column.dtype == "object"), source.schema.input)


def _entry(
    table: AuditTable, samples: dict[str, dict[int, dict[str, Any]]], source: SampleSource, sample: int
) -> dict[str, Any]:
    suggested, split = int(table.suggested_label[sample]), str(table.duplicate_split[sample])
    twin = samples.get(split, {}).get(int(table.duplicate_of[sample]))
    return {
        **samples["train"][sample],
        "suggested": suggested,
        "suggested_name": _class_name(source, suggested),
        "p_wrong": round(float(table.p_wrong[sample]), 6),
        "evidence": str(table.evidence[sample]),
        "duplicate": None if twin is None else {"split": split, **twin},
    }


def _class_name(source: SampleSource, label: int) -> str | None:
    names = source.schema.class_names
    return names[label] if label < len(names) else None


def _in_words(row: Any) -> str:
    """Return the first values of an array, or the start of a text.

    >>> _in_words(np.arange(10, dtype=np.float32)), _in_words("a  cat")
    ('0, 1, 2, 3, 4, 5, 6, 7, …', 'a cat')
    """
    if isinstance(row, np.ndarray | list | tuple):
        values = np.asarray(row).reshape(-1)
        words = [f"{value:.4g}" if isinstance(value, int | float) else str(value) for value in values.tolist()]
        text = ", ".join(words[:_MAX_VALUES]) + (", …" if values.size > _MAX_VALUES else "")
    else:
        text = " ".join(str(row).split())
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"
