"""Fixed: training on the subset of a file."""

from __future__ import annotations

import pytest

from rayprune.core import Selection, Selector
from rayprune.methods import build_method


def test_every_epoch_keeps_the_subset_of_the_file() -> None:
    chosen = Selection.of_ids([1, 4, 6], 8, weights=[0.5, 1.0, 2.0])
    selector = Selector(build_method({"name": "fixed", "path": "a.parquet"}), 8, 5, chosen=chosen)
    for epoch in range(5):
        selection = selector.begin_epoch(epoch)
        assert selection.ids.tolist() == [1, 4, 6]
        assert selection.weights.tolist() == [0.5, 1.0, 2.0]
        assert selection.requested == selection.realised == 5 / 8
    assert selection.facts["budget_so_far"] == 3 / 8


def test_a_missing_or_unfit_selection_is_refused() -> None:
    for config, cure in (({"path": "a.parquet"}, "chosen="), ({}, r"method\.path=")):
        with pytest.raises(ValueError, match=cure):
            Selector(build_method({"name": "fixed", **config}), 8, 5).begin_epoch(0)
    with pytest.raises(ValueError, match="over 9 samples, not 8"):
        Selector(build_method({"name": "fixed", "path": "a"}), 8, 5, chosen=Selection.full(9))


def test_it_has_no_scores_to_shuffle() -> None:
    with pytest.raises(ValueError, match="no scores to permute"):
        build_method({"name": "shuffled", "of": {"name": "fixed", "path": "a"}})
