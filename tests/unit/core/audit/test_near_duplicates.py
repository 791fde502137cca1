"""The method that condenses embeddings to near-duplicates and outliers."""

from __future__ import annotations

import numpy as np
import pytest

from rayprune.core.algorithms.near_duplicates import ACROSS, NONE, WITHIN
from rayprune.core.audit.near_duplicates import NearDuplicates
from rayprune.core.selector import Selector
from rayprune.errors import ConfigError
from rayprune.methods import METHODS, build_method
from rayprune.testing import check_method

REFERENCE = "rayprune.core.audit.near_duplicates:NearDuplicates"


def swept(method: NearDuplicates, vectors: np.ndarray) -> Selector:
    num = len(vectors)
    selector = Selector(method, num, 2, labels=np.arange(num) % 2)
    selector.begin_epoch(0)
    selector.observe(np.arange(num), {"loss": np.zeros(num)}, 0)
    selector.observe(np.arange(num)[::-1], {"embedding": vectors[::-1]}, 0, sweep=True)
    selector.end_sweep()
    return selector


def test_columns_and_selection() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 5)).astype(np.float32)
    vectors[20] = vectors[45] = 2 * vectors[4]
    vectors[31] = vectors[30]
    selector = swept(build_method({"name": REFERENCE, "prune_ratio": 0.05, "radius": 1e-3, "num_train": 40}), vectors)
    table = selector.table
    of, split = np.full(60, -1), np.full(60, NONE)
    of[[20, 45]], of[31] = 4, 30
    split[[4, 20, 45]], split[[30, 31]] = ACROSS, WITHIN
    np.testing.assert_array_equal(table["duplicate_of"], of)
    np.testing.assert_array_equal(table["duplicate_split"], split)
    np.testing.assert_array_equal(np.isnan(table["duplicate_similarity"]), split == NONE)
    assert np.isfinite(table["outlier"]).all()
    assert np.setdiff1d(np.arange(60), selector.begin_epoch(1).ids).tolist() == [20, 31, 45]
    assert {"duplicate_of", "duplicate_split", "duplicate_similarity", "outlier"} <= set(selector.scores())


def test_lengths_count_only_if_standardized() -> None:
    vectors = np.array([[1, 0], [3, 0], [0, 1], [0, 1]], dtype=np.float32)
    options = {"name": REFERENCE, "radius": 0.1}
    assert swept(build_method(options), vectors).table["duplicate_of"].tolist() == [-1, 0, -1, 2]
    standardized = build_method({**options, "standardize": True})
    assert swept(standardized, vectors).table["duplicate_of"].tolist() == [-1, -1, -1, 2]


def test_the_contract_of_methods_holds() -> None:
    check_method(REFERENCE)


def test_it_is_not_registered() -> None:
    assert NearDuplicates not in METHODS.values()


@pytest.mark.parametrize("options", [{"radius": -1.0}, {"neighbor": 0}])
def test_wrong_hyperparameters(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        build_method({"name": REFERENCE, **options})
