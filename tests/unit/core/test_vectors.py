"""Vectors of a forward-only pass: stored outside checkpoints, condensed, deleted."""

from __future__ import annotations

import logging
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rayprune import EpochContext, Method, ScoreTable, Selection, Selector
from rayprune.core.vectors import VectorColumn, Vectors

N, D = 6, 3
EMBEDDINGS = np.arange(N * D, dtype=np.float32).reshape(N, D)


@dataclass(frozen=True)
class FirstNumber(Method):
    """Keep the half with the largest first number, chosen once after epoch 0."""

    kind, paper, signals, fixed = "static", "of this test", ("loss",), True
    sweep_signals = ("embedding",)

    storage: Any = "float32"

    def columns(self) -> Mapping[str, Any]:
        return {"loss": np.float32, "first": np.float32, "embedding": VectorColumn(self.storage)}

    def condense(self, table: ScoreTable, context: EpochContext) -> None:
        table["first"][:] = table.vectors["embedding"].array[:, 0]

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        if context.epoch == 0:
            full = Selection.full(context.num_samples)
            return Selection(full.codes, full.weight_values, sweep="all")
        return Selection.of_mask(table["first"] > np.median(table["first"]), 0.5, N // 2)


def swept(method: Method, ids: np.ndarray, embeddings: np.ndarray = EMBEDDINGS) -> Selector:
    """Return a Selector in epoch 0, whose forward-only pass has seen these ids."""
    selector = Selector(method, N, num_epochs=3)
    assert selector.begin_epoch(0).num_scored == N
    selector.observe(np.arange(N), {"loss": np.ones(N)}, 0)
    for part in np.array_split(ids, 2):
        selector.observe(part, {"embedding": embeddings[part]}, 0, sweep=True)
    return selector


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_next_epoch_condenses_the_vectors_and_deletes_them(storage: str) -> None:
    selector = swept(FirstNumber(storage=storage), np.array([5, 1, 3, 0, 2, 4]))
    assert selector.table.vectors["embedding"].array.dtype == storage
    assert selector.begin_epoch(1).ids.tolist() == [3, 4, 5]
    assert selector.table.vectors["embedding"].is_empty


def test_states_hold_the_condensed_columns_and_no_vectors() -> None:
    selector = swept(FirstNumber(), np.arange(N))
    assert not [name for name in selector.state_dict() if "embedding" in name]
    selector.end_sweep()
    state = {name: np.array(array) for name, array in selector.state_dict().items()}
    restored = Selector(FirstNumber(), N, num_epochs=3)
    restored.load_state_dict(state)
    assert restored.begin_epoch(1).ids.tolist() == selector.begin_epoch(1).ids.tolist() == [3, 4, 5]


def test_a_sample_without_a_vector_is_named() -> None:
    selector = swept(FirstNumber(), np.array([0, 1, 3, 4, 5]))
    with pytest.raises(ValueError, match=r"1 of 6 samples have no embedding, ids \[2\]: .*shard\.sweep"):
        selector.begin_epoch(1)
    lost = EMBEDDINGS.copy()
    lost[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 6 samples have no embedding, ids \[4\]: .*NaN"):
        swept(FirstNumber(), np.arange(N), lost).begin_epoch(1)


def test_vectors_that_do_not_fit_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = Vectors("embedding", N, "float16")
    vectors.put(np.array([0]), np.ones((1, 3)))
    with pytest.raises(ValueError, match="embedding has 4 numbers and had 3 before"):
        vectors.put(np.array([1]), np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"beyond the range of float16: use method\.storage=float32"):
        vectors.put(np.array([1]), np.full((1, 3), 1e6))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(100, 90, 10))
    with pytest.raises(ValueError, match=r"takes 0\.0 GiB, and .* GiB free: set TMPDIR .*, or method\.storage=float16"):
        Vectors("embedding", N, "float32").put(np.array([0]), np.ones((1, 3)))


def test_the_size_is_said_and_no_file_is_left(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    vectors = Vectors("embedding", 1_000, "float16")
    with caplog.at_level(logging.INFO):
        vectors.put(np.array([7]), np.ones((1, 512)))
    assert f"embedding of 1,000 samples, 512 numbers each, in float16: 1.0 MiB in {tmp_path}" in caplog.text
    assert not list(tmp_path.iterdir())
