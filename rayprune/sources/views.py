"""Views of a source: its first rows, chosen rows, a stratified holdout.

Shapes: N samples, N' chosen, B batch.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from rayprune.sources.base import SampleSource, Schema, Splits, check_ids
from rayprune.sources.fingerprint import digest


class Limited(SampleSource):
    """The first samples of a source.

    A limit that cuts nothing keeps the source's fingerprint, so that scores of the whole source still fit.

    Args:
        source: any source.
        num_samples: at least 1; more than the source holds means all of them.

    Raises:
        ValueError: num_samples is below 1.
    """

    def __init__(self, source: SampleSource, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"data.limit is {num_samples}: set it to at least 1, or leave it out for all samples")
        self._source = source
        self._num_samples = min(num_samples, len(source))

    def __len__(self) -> int:
        return self._num_samples

    @property
    def schema(self) -> Schema:
        return self._source.schema

    @property
    def fingerprint(self) -> str:
        whole = self._num_samples == len(self._source)
        return self._source.fingerprint if whole else digest("limited", self._source.fingerprint, self._num_samples)

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[: self._num_samples]

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, self._num_samples)
        return self._source.read(ids)

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        return None if groups is None else np.append(groups[groups < self._num_samples], self._num_samples)

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return self._source.row_cost

    def prepare(self) -> None:
        self._source.prepare()


class Subset(SampleSource):
    """Chosen rows of a source, in the order given: id i is row `rows[i]`.

    Args:
        source: any source.
        rows: (N',) int64 ids of the source.

    Raises:
        ValueError: a row is not in the source.
    """

    def __init__(self, source: SampleSource, rows: np.ndarray) -> None:
        check_ids(rows, len(source))
        self._source = source
        self._rows = np.ascontiguousarray(rows, dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Ascending rows, which is what a holdout makes, travel as one bit a row: pickles go out with every read task.
        if not self._ascending:
            return {"source": self._source, "rows": self._rows}
        chosen = np.zeros(len(self._source), dtype=bool)
        chosen[self._rows] = True
        return {"source": self._source, "bits": np.packbits(chosen)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._source = state["source"]
        self._rows = state["rows"] if "rows" in state else np.flatnonzero(np.unpackbits(state["bits"])).astype(np.int64)

    @property
    def _ascending(self) -> bool:
        return bool((np.diff(self._rows) > 0).all())

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def schema(self) -> Schema:
        return self._source.schema

    @property
    def fingerprint(self) -> str:
        return digest("subset", self._source.fingerprint, self._rows)

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels[self._rows]

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        check_ids(ids, len(self._rows))
        return self._source.read(self._rows[ids])

    @property
    def groups(self) -> np.ndarray | None:
        groups = self._source.groups
        if groups is None or not self._ascending:
            return None
        return np.unique(np.searchsorted(self._rows, groups)).astype(np.int64)

    @property
    def row_cost(self) -> Literal["cheap", "expensive"]:
        return self._source.row_cost

    def prepare(self) -> None:
        self._source.prepare()


def holdout(source: SampleSource, fraction: float, seed: int) -> Splits:
    """Split off a stratified validation part.

    Classes share `round(fraction · N)` (at least 1) validation samples in proportion, by largest remainder; every
    class keeps a training sample, so a class with a single one is never held out. Both parts keep the source's order.

    Args:
        source: any source with N samples.
        fraction: validation share, above 0 and below 1.
        seed: of `numpy.random.default_rng`.

    Returns:
        Both parts; validation is None where no class has two samples.

    Raises:
        ValueError: the fraction is outside its range.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}: it must be above 0 and below 1")
    labels = source.labels
    classes, counts = np.unique(labels, return_counts=True)
    quotas = _quotas(counts, fraction)
    if quotas.sum() == 0:
        return Splits(source, None)
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label, quota in zip(classes, quotas, strict=True):
        held[rng.permutation(np.flatnonzero(labels == label))[:quota]] = True
    return Splits(Subset(source, np.flatnonzero(~held)), Subset(source, np.flatnonzero(held)))


def _quotas(counts: np.ndarray, fraction: float) -> np.ndarray:
    total = max(1, round(fraction * int(counts.sum())))
    shares = fraction * counts
    quotas = np.minimum(np.floor(shares).astype(np.int64), counts - 1)
    for position in np.argsort(quotas - shares, kind="stable"):
        if quotas.sum() < total and quotas[position] < counts[position] - 1:
            quotas[position] += 1
    return np.asarray(quotas)
