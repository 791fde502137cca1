"""Views of data sources: the first samples, some of them, other labels, two sources in one; held-out samples.

Shapes: N samples, N' chosen samples, B batch, C classes, G groups.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rayprune.errors import ConfigError, DataError
from rayprune.sources.base import RowCost, SampleSource, Schema, Splits, check_ids
from rayprune.sources.fingerprint import digest


class _View(SampleSource):
    """Some samples of another source: those with its ids `rows`."""

    def __init__(self, source: SampleSource, rows: np.ndarray | slice) -> None:
        self._source, self._rows = source, rows

    @property
    def schema(self) -> Schema:
        return self._source.schema

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[self._rows]

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    @property
    def row_cost(self) -> RowCost:
        return self._source.row_cost

    def file_of(self, sample: int) -> str | None:
        # A slice begins with the first row.
        return self._source.file_of(sample if isinstance(self._rows, slice) else int(self._rows[sample]))

    def prepare(self) -> None:
        self._source.prepare()


class Limited(_View):
    """The first samples of a source.

    A limit that removes nothing keeps the source's fingerprint, so that scores of the whole source still fit.

    Args:
        source: any source.
        num_samples: at least 1; if the source has fewer, all are kept.

    Raises:
        ConfigError: num_samples is below 1.
    """

    def __init__(self, source: SampleSource, num_samples: int) -> None:
        if num_samples < 1:
            raise ConfigError(f"data.limit is {num_samples}: set it to at least 1, or leave it out for all samples")
        self._num_samples = min(num_samples, len(source))
        super().__init__(source, slice(self._num_samples))

    def __len__(self) -> int:
        return self._num_samples

    @property
    def fingerprint(self) -> str:
        whole = self._num_samples == len(self._source)
        return self._source.fingerprint if whole else digest("limited", self._source.fingerprint, self._num_samples)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        return self._source.read(ids)

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        return None if groups is None else np.append(groups[groups < self._num_samples], self._num_samples)


class Subset(_View):
    """Chosen samples of a source, in the given order: id i is sample `rows[i]`.

    Args:
        source: any source.
        rows: (N',) int64 ids of the source.

    Raises:
        DataError: a row is not in the source.
    """

    _rows: np.ndarray

    def __init__(self, source: SampleSource, rows: np.ndarray) -> None:
        check_ids(rows, len(source))
        super().__init__(source, np.ascontiguousarray(rows, dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        # Every read task carries a pickle. Ascending rows, such as those of a holdout, take one bit per source row.
        if not self._is_ascending:
            return {"source": self._source, "rows": self._rows}
        chosen = np.zeros(len(self._source), dtype=bool)
        chosen[self._rows] = True
        return {"source": self._source, "bits": np.packbits(chosen)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state["rows"] if "rows" in state else np.flatnonzero(np.unpackbits(state["bits"])).astype(np.int64)
        super().__init__(state["source"], rows)

    @property
    def _is_ascending(self) -> bool:
        return bool((np.diff(self._rows) > 0).all())

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        return digest("subset", self._source.fingerprint, self._rows)

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        return self._source.read(self._rows[ids])

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        if groups is None or not self._is_ascending:
            return None
        return np.unique(np.searchsorted(self._rows, groups)).astype(np.int64)


class Concatenated(SampleSource):
    """The samples of one source and then those of another, such as training and validation data.

    Args:
        first, second: sources with the same columns.

    Raises:
        DataError: the columns differ.
    """

    def __init__(self, first: SampleSource, second: SampleSource) -> None:
        if dict(first.schema.columns) != dict(second.schema.columns):
            shapes = [{name: column.shape for name, column in each.schema.columns.items()} for each in (first, second)]
            raise DataError(
                f"rows of {shapes[0]} and of {shapes[1]} cannot be read together: give both the same columns"
            )
        self._parts = (first, second)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def schema(self) -> Schema:
        return self._parts[0].schema

    @property
    def fingerprint(self) -> str:
        return digest("concatenated", *(part.fingerprint for part in self._parts))

    @property
    def labels(self) -> np.ndarray:
        return np.concatenate([part.labels for part in self._parts])

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self))
        first, second = self._parts
        in_second = ids >= len(first)
        if not in_second.any():
            return first.read(ids)
        if in_second.all():
            return second.read(ids - len(first))
        parts = [first.read(ids[~in_second]), second.read(ids[in_second] - len(first))]
        back = np.argsort(np.argsort(in_second, kind="stable"))
        columns = {name: np.concatenate([part[name] for part, _ in parts])[back] for name in self.schema.columns}
        return columns, sum(num_bytes for _, num_bytes in parts)

    @property
    def groups(self) -> np.ndarray | None:
        groups = [part.groups for part in self._parts]
        if all(each is None for each in groups):
            return None
        # Rows that can be read one by one are one group where those of the other part are not.
        first, second = (
            np.array([0, len(part)]) if each is None else each for part, each in zip(self._parts, groups, strict=True)
        )
        return np.concatenate([first, second[1:] + len(self._parts[0])])

    @property
    def row_cost(self) -> RowCost:
        return "expensive" if any(part.row_cost == "expensive" for part in self._parts) else "cheap"

    def prepare(self) -> None:
        for part in self._parts:
            part.prepare()


class Relabeled(_View):
    """All samples of a source, with other labels.

    Labels that are those of the source keep its fingerprint, so that scores of the source still fit.

    Args:
        source: any source whose samples have a class.
        labels: (N,) integers in 0..num_classes-1.
        num_classes: of the labels, at least the source's, which is the default; more have no names.

    Raises:
        DataError: there is not one label for each sample, or one is no class.
    """

    def __init__(self, source: SampleSource, labels: np.ndarray, num_classes: int | None = None) -> None:
        schema = source.schema
        num_classes = num_classes or schema.num_classes or 0
        self._schema = schema if num_classes == schema.num_classes else replace(schema, num_classes=num_classes)
        if labels.shape != (len(source),) or labels.dtype.kind not in "iu":
            raise DataError(f"new labels are {labels.dtype} of shape {labels.shape}: give {len(source)} integers")
        outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if outside.size:
            raise DataError(
                f"sample {outside[0]} gets label {labels[outside[0]]}, outside 0..{num_classes - 1}: give one inside"
            )
        super().__init__(source, slice(None))
        # Every read task carries a pickle: only what changes goes along.
        self._changed = np.flatnonzero(labels != source.labels)
        self._new = labels[self._changed].astype(np.int64)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def num_changed(self) -> int:
        """The number of samples whose label differs from the source's."""
        return len(self._changed)

    @property
    def labels(self) -> np.ndarray:
        labels = self._source.labels.copy()
        labels[self._changed] = self._new
        return labels

    @property
    def fingerprint(self) -> str:
        whole = self._source.fingerprint
        return digest("relabeled", whole, self._changed, self._new) if self.num_changed else whole

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        columns, num_bytes = self._source.read(ids)
        places = np.searchsorted(self._changed, ids)
        rows = np.flatnonzero(np.append(self._changed, -1)[places] == ids)
        labels = columns["label"].copy()  # the source's own array, perhaps
        labels[rows] = self._new[places[rows]]
        return {**columns, "label": labels}, num_bytes

    @property
    def groups(self) -> np.ndarray | None:
        return self._source.groups


def holdout(source: SampleSource, fraction: float, seed: int = 0) -> Splits:
    """Split off a stratified validation part.

    The validation part has `round(fraction · N)` samples, at least 1, distributed over the classes in proportion to
    their sizes, by largest remainder. Every class keeps a training sample. Both parts keep the source's order.

    Args:
        source: any source with N samples.
        fraction: validation share, below 1; 0 for no validation part.
        seed: of `numpy.random.default_rng`.

    Returns:
        Both parts; validation is also None if no class has two samples.

    Raises:
        ConfigError: the fraction is outside its range.
        DataError: the samples have no class.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction}: it must be at least 0 and below 1")
    if fraction == 0:
        return Splits(source, None)
    labels = source.labels
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _holdout_quotas(counts, fraction)
    if quotas.sum() == 0:
        return Splits(source, None)
    rng = np.random.default_rng(seed)
    validates = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        validates[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return Splits(Subset(source, np.flatnonzero(~validates)), Subset(source, np.flatnonzero(validates)))


def _holdout_quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    total = max(1, round(fraction * int(counts.sum())))
    shares = fraction * counts
    quotas = np.minimum(np.floor(shares).astype(np.int64), counts - 1)
    for position in np.argsort(quotas - shares, kind="stable"):
        if quotas.sum() < total and quotas[position] < counts[position] - 1:
            quotas[position] += 1
    return np.asarray(quotas)
