"""Rows as images or vectors, for passes that compare samples whatever their columns are.

Shapes: N samples, B batch, F features.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from rayprune.core.algorithms.ngrams import hashed_ngrams
from rayprune.errors import DataError
from rayprune.sources.base import Column, RowCost, SampleSource, Schema
from rayprune.sources.datasets.columns import LABEL_COLUMNS
from rayprune.sources.fingerprint import digest

Kind = Literal["image", "features", "text"]

_TEXT_WIDTH = 512
# Columns beside token ids that say nothing about a text.
_IGNORED = ("mask", "token_type_ids", "position_ids")


def compared_columns(schema: Schema) -> tuple[Kind, list[str]]:
    """Return the kind of a source's inputs, and the columns that hold them.

    These are the input column, if the source has one; else an image, (H, W, 1 or 3) uint8; else the texts and token
    ids; else all numbers apart from the label.

    Raises:
        DataError: there are none.
    """
    if schema.input in ("image", "features"):
        return ("image", [schema.input]) if schema.input == "image" else ("features", [schema.input])
    columns = {name: column for name, column in schema.columns.items() if name not in LABEL_COLUMNS}
    if images := [name for name, column in columns.items() if _is_image(column)]:
        return "image", images[:1]
    texts = [name for name, each in columns.items() if _is_text(each) and not any(part in name for part in _IGNORED)]
    if texts:
        return "text", texts
    numbers = [name for name, column in columns.items() if not column.in_objects and column.dtype != "object"]
    if not numbers:
        raise DataError(f"columns {list(schema.columns)} hold no image, text or numbers to compare samples by")
    return "features", numbers


def _is_image(column: Column) -> bool:
    return len(column.shape) == 3 and column.dtype == "uint8" and -1 not in column.shape and column.shape[2] in (1, 3)


def _is_text(column: Column) -> bool:
    if column.dtype == "object":
        return True
    return len(column.shape) == 1 and column.shape != (1,) and np.dtype(column.dtype).kind in "iu"


class VectorView(SampleSource):
    """A source's inputs as `image` or `features`, with labels; texts become hashed bags of n-grams.

    Samples without classes all have label 0.

    Args:
        source: any source.

    Raises:
        DataError: there is nothing to compare samples by.
    """

    def __init__(self, source: SampleSource) -> None:
        self._source = source
        self.kind, self._names = compared_columns(source.schema)
        columns = [source.schema.columns[name] for name in self._names]
        sizes = {"text": _TEXT_WIDTH, "features": sum(math.prod(column.shape) for column in columns)}
        shape = columns[0].shape if self.kind == "image" else (sizes[self.kind],)
        name = "image" if self.kind == "image" else "features"
        num_classes = source.schema.num_classes
        if num_classes is None and (label := self._label) is not None:
            labels = source.labels
            num_classes = int(labels.max(initial=0)) + 1 if labels.min(initial=0) >= 0 and label else None
        self._has_classes = num_classes is not None
        self._schema = Schema.for_classification(name, shape, num_classes or 1)

    @property
    def _label(self) -> str | None:
        columns = self._source.schema.columns
        named = (name for name in LABEL_COLUMNS if name in columns)
        return next((n for n in named if columns[n].shape == () and np.dtype(columns[n].dtype).kind in "iub"), None)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def fingerprint(self) -> str:
        return digest("vectors", self._source.fingerprint, self.kind, *self._names)

    @property
    def labels(self) -> np.ndarray:
        return self._source.labels if self._has_classes else np.zeros(len(self), dtype=np.int64)

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        columns, num_bytes = self._source.read(ids)
        inputs = [columns[name] for name in self._names]
        if self.kind == "image":
            rows = np.ascontiguousarray(inputs[0])
        elif self.kind == "text":
            texts = [hashed_ngrams(list(column), _TEXT_WIDTH) for column in inputs]
            rows = np.asarray(sum(texts) / np.float32(math.sqrt(len(texts))))
        else:
            rows = np.concatenate([column.reshape(len(ids), -1) for column in inputs], axis=1).astype(np.float32)
        label = columns[self._label] if self._has_classes and self._label else np.zeros(len(ids))
        return {self._schema.input: rows, "label": np.asarray(label, dtype=np.int64)}, num_bytes

    @property
    def groups(self) -> np.ndarray | None:
        return self._source.groups

    @property
    def row_cost(self) -> RowCost:
        return "expensive" if self.kind == "text" else self._source.row_cost

    def prepare(self) -> None:
        self._source.prepare()
