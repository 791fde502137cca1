"""The section "Data audit" of a run's page, from audit.parquet, audit.json and audit_gallery/.

Only audit.parquet is needed: what audit.json lacks is counted here, and without a gallery there are no pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import Field, ValidationError

from rayprune.errors import RunFolderError
from rayprune.report.gallery import class_text, data_uri
from rayprune.report.read import StoredModel, read_json
from rayprune.report.tables import Table
from rayprune.report.text import count_of, share
from rayprune.sources.tables.audits import AUDIT_NAME, GROUPS, AuditTable, read_audit

_MAX_PAIRS = 12
_MAX_ROWS = 20  # of a group whose samples have no contents here
TRAINED = (
    "The network has trained on these labels, so errors that it has memorized are not seen: rayprune audit CONFIG, "
    "which leaves parts of the samples out, finds more."
)
WEAK = (
    "The networks predict too few of the labels to tell wrong labels from samples that are hard: audit with better "
    "networks, such as more epochs or another model. The share of wrong labels is probably lower."
)
_IN_TRAINING = (
    "The networks were training on these labels, so errors that they have memorized are not seen: rayprune audit "
    "CONFIG with audit.folds of at least 2 finds more."
)
_CAVEATS = {"trained_network": TRAINED, "training_visits": _IN_TRAINING}
Stored = TypeVar("Stored", bound=StoredModel)
_TITLES = {
    "wrong_label": (
        "Probably wrong labels",
        "Given label → likely label, and the probability that the given one is wrong.",
    ),
    "duplicate": ("Duplicates", "Training samples with the same content as another training sample, on the right."),
    "leak": ("Leaks", "Training samples with the same content as a validation sample, on the right."),
    "outlier": ("Outliers", "Training samples that are unlike all others, of any class."),
    "never_learned": (
        "Never learned",
        "Samples that no network predicted as labeled when it trained on them.",
    ),
    "easy": ("Easy", "Samples that were learned early and always predicted as labeled."),
}


class Finding(StoredModel):
    """A sample; `image` is a file name when read and a data URI on the page."""

    id: int
    label: int
    label_name: str | None = None
    image: str | None = None
    text: str | None = None
    file: str | None = None

    @property
    def label_text(self) -> str:
        """The label with its class name."""
        return class_text(self.label, self.label_name)


class Twin(Finding):
    """A sample with the same content as another one, in a split."""

    split: str


class Suspect(Finding):
    """A sample of audit_gallery/gallery.json."""

    suggested: int
    suggested_name: str | None = None
    p_wrong: float
    evidence: str = ""
    duplicate: Twin | None = None

    @property
    def caption(self) -> str:
        """The label, and the likely one if it is another."""
        if self.suggested == self.label:
            return self.label_text
        return f"{self.label_text} → {class_text(self.suggested, self.suggested_name)}"

    @property
    def lines(self) -> list[str]:
        """The sample's other facts."""
        file = [] if self.file is None else ["/".join(self.file.split("/")[-2:])]  # class and name
        lines = [f"id {self.id}", *file, f"wrong {share(self.p_wrong, 1)}"]
        if self.duplicate is not None:
            lines.append(f"as {self.duplicate.split} id {self.duplicate.id}, labeled {self.duplicate.label_text}")
        return [*lines, self.evidence] if self.evidence else lines


class _Gallery(StoredModel):
    groups: dict[str, list[Suspect]] = Field(default_factory=dict)


class _Pair(StoredModel):
    label: int
    suggested: int
    count: int
    rate: float | None = None


class _Summary(StoredModel):
    """audit.json; every field may be missing."""

    noise_rate: float | None = None
    pairs: list[_Pair] | None = None
    groups: dict[str, int] | None = None
    predictions: str | None = None
    is_weak: bool = False
    class_names: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class AuditGroup:
    """The samples of a group.

    Attributes:
        title, text: the heading, and what the group is.
        samples: with pictures; empty without any.
        table: the same samples as a table if they have no pictures.
    """

    title: str
    text: str
    samples: Sequence[Suspect]
    table: Table | None


@dataclass(frozen=True)
class Audit:
    """The contents of the section.

    Attributes:
        verdict: the findings in a sentence or two.
        counts: the number of samples of each group.
        pairs: the most frequent pairs of labels, with their share of the given label; None for none.
        groups: the samples to show.
    """

    verdict: Sequence[str]
    counts: Table
    pairs: Table | None
    groups: Sequence[AuditGroup]


def read_audit_section(run_folder: Path) -> Audit | None:
    """Return the audit of a run folder; None without one.

    Raises:
        RunFolderError: a file is not what an audit writes, or of a newer schema.
    """
    if not (run_folder / AUDIT_NAME).exists():
        return None
    table = read_audit(run_folder).table
    summary = _stored(_Summary, run_folder / "audit.json")
    gallery = _stored(_Gallery, run_folder / "audit_gallery" / "gallery.json")
    counted = Counter(table.group.tolist())
    counts = {name: (summary.groups or counted).get(name, 0) for name in GROUPS}
    shown = gallery.groups if (run_folder / "audit_gallery").exists() else _without_contents(table, summary)
    groups = [_group(name, shown[name], run_folder / "audit_gallery") for name in GROUPS if shown.get(name)]
    return Audit(_verdict(table, summary), _counts_table(counts, len(table)), _pairs_table(table, summary), groups)


def _stored(model: type[Stored], file: Path) -> Stored:
    try:
        return model.model_validate(read_json(file))
    except ValidationError:
        raise RunFolderError(f"{file} is not what an audit writes: audit again, or delete the file") from None


def _verdict(table: AuditTable, summary: _Summary) -> list[str]:
    rate = float(table.p_wrong.mean(dtype=np.float64)) if summary.noise_rate is None else summary.noise_rate
    suspects = int((table.p_wrong >= 0.5).sum())
    have = "has" if suspects == 1 else "have"
    caveat = _CAVEATS.get(summary.predictions or "")
    return [
        f"About {share(rate, 1)} of the labels are wrong.",
        f"{count_of(suspects, 'sample')} of {len(table):,} more likely {have} a wrong label than a right one.",
        *([WEAK] if summary.is_weak else []),
        *([caveat] if caveat else []),
    ]


def _counts_table(counts: Mapping[str, int], num_samples: int) -> Table:
    rows = [(_TITLES[name][0], f"{count:,}", share(count / max(num_samples, 1))) for name, count in counts.items()]
    return Table(("group", "samples", "share"), rows)


def _pairs_table(table: AuditTable, summary: _Summary) -> Table | None:
    """Return the most frequent pairs of given and likely labels; counted if audit.json has none."""
    pairs = summary.pairs
    if pairs is None:
        of_label = Counter(table.label.tolist())
        wrong = np.flatnonzero(table.relabeled & (table.p_wrong >= 0.5))
        counted = Counter(zip(table.label[wrong].tolist(), table.suggested_label[wrong].tolist(), strict=True))
        pairs = [
            _Pair(label=label, suggested=suggested, count=count, rate=count / of_label[label])
            for (label, suggested), count in counted.items()
        ]
    if not pairs:
        return None

    def text(label: int) -> str:
        return class_text(label, summary.class_names[label] if label < len(summary.class_names) else None)

    pairs = sorted(pairs, key=lambda pair: (-pair.count, pair.label, pair.suggested))[:_MAX_PAIRS]
    rows = [(text(pair.label), text(pair.suggested), f"{pair.count:,}", share(pair.rate, 1)) for pair in pairs]
    return Table(("given label", "likely label", "samples", "share"), rows, words=(0, 1))


def _without_contents(table: AuditTable, summary: _Summary) -> dict[str, list[Suspect]]:
    """Return the most certain samples of each group, as a loop's audit has no gallery."""
    names = summary.class_names

    def name_of(label: int) -> str | None:
        return names[label] if label < len(names) else None

    def suspect(row: int) -> Suspect:
        label, suggested = int(table.label[row]), int(table.suggested_label[row])
        of, split, twin = int(table.duplicate_of[row]), str(table.duplicate_split[row]), None
        if split == "train":
            twin = Twin(id=of, label=int(table.label[of]), label_name=name_of(int(table.label[of])), split=split)
        return Suspect(
            id=row,
            label=label,
            label_name=name_of(label),
            suggested=suggested,
            suggested_name=name_of(suggested),
            p_wrong=float(table.p_wrong[row]),
            evidence=str(table.evidence[row]),
            duplicate=twin,
        )

    most = {name: np.flatnonzero(table.group == name) for name in GROUPS}
    order = {name: rows[np.argsort(-table.p_wrong[rows], kind="stable")][:_MAX_ROWS] for name, rows in most.items()}
    return {name: [suspect(int(row)) for row in rows] for name, rows in order.items()}


def _group(name: str, stored: Sequence[Suspect], folder: Path) -> AuditGroup:
    title, text = _TITLES[name]
    samples = [_with_pictures(sample, folder) for sample in stored]
    if any(sample.image for sample in samples):
        return AuditGroup(title, text, samples, None)
    rows = []
    for sample in samples:
        twin = sample.duplicate
        other = "" if twin is None else f"{twin.split} id {twin.id}, labeled {twin.label_text}"
        cells = (str(sample.id), sample.caption, sample.text or "", other, sample.evidence, share(sample.p_wrong, 1))
        rows.append(cells)
    head = ("id", "label", "content", "same as", "evidence", "wrong")
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    cut = [tuple(row[column] for column in used) for row in rows]
    names = tuple(head[column] for column in used)
    words = [place for place, column in enumerate(names) if column not in ("id", "wrong")]
    return AuditGroup(title, text, [], Table(names, cut, words))


def _with_pictures(sample: Suspect, folder: Path) -> Suspect:
    twin = sample.duplicate
    if twin is not None:
        twin = twin.model_copy(update={"image": data_uri(folder, twin.image)})
    return sample.model_copy(update={"image": data_uri(folder, sample.image), "duplicate": twin})
