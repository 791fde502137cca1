"""A subset from a file: what Fixed keeps, and what batch-mean weights are."""

from __future__ import annotations

import numpy as np
import pytest

from rayprune.core import Selection, Selector
from rayprune.core.plan import Plan
from rayprune.methods import build_method


def test_the_file_decides_every_epoch() -> None:
    chosen = Selection.of_ids([1, 4, 6], 8, weights=[0.5, 1.0, 2.0])
    selector = Selector(build_method({"name": "fixed", "path": "a.parquet"}), 8, 5, chosen=chosen)
    for epoch in range(5):
        selection = selector.begin_epoch(epoch)
        assert selection.ids.tolist() == [1, 4, 6]
        assert selection.weights.tolist() == [0.5, 1.0, 2.0]
        assert selection.requested == selection.realised == 5 / 8
    assert selection.facts["budget_so_far"] == 3 / 8


def test_without_its_file_it_says_what_to_give() -> None:
    for config, cure in (({"path": "a.parquet"}, "chosen="), ({}, r"method\.path=")):
        with pytest.raises(ValueError, match=cure):
            Selector(build_method({"name": "fixed", **config}), 8, 5).begin_epoch(0)
    with pytest.raises(ValueError, match="over 9 samples, here 8"):
        Selector(build_method({"name": "fixed", "path": "a"}), 8, 5, chosen=Selection.full(9))


def test_shuffled_scores_of_a_file_are_refused() -> None:
    with pytest.raises(ValueError, match="no scores to permute"):
        build_method({"name": "shuffled", "of": {"name": "fixed", "path": "a"}})


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("steps", [(0, 3), (1, 2), (2, 3)])
def test_batch_mean_weights_are_one_scalar_a_batch(world_size: int, steps: tuple[int, int]) -> None:
    given = np.linspace(0.1, 1.0, 10).astype(np.float32)
    own = Selection.of_ids(np.arange(10), 20, weights=given)
    mean = Selection(own.codes, own.weight_values, batch_mean_weights=True)
    plan = Plan.of_selection(mean, batch_size=4, seed=0, epoch=0)
    start, stop = steps
    for rank in range(world_size):
        _, weights, real = plan.share(rank, world_size, start, stop)
        size = 4 // world_size
        for number, step in enumerate(range(start, stop)):
            rows = plan.order[step * 4 : min(step * 4 + 4, 10)]
            mine = slice(number * size, (number + 1) * size)
            expected = given[rows].astype(np.float64).mean()
            np.testing.assert_allclose(weights[mine][real[mine]], expected, rtol=1e-6)
            assert not weights[mine][~real[mine]].any()
    assert plan.hash != Plan.of_selection(own, batch_size=4, seed=0, epoch=0).hash
    assert Selection.from_arrays(mean.to_arrays()).batch_mean_weights


def test_sweep_and_facts_survive_a_state() -> None:
    base = Selection.of_ids([0, 1], 5, forward_only_ids=[3])
    for sweep, scored in (("all", None), (np.array([4, 0]), [0, 3, 4]), (None, [3])):
        selection = base.with_sweep(sweep).with_facts(threshold=0.5)  # type: ignore[arg-type]
        again = Selection.from_arrays(selection.to_arrays())
        ids = again.scored_ids
        assert (ids is None and scored is None) or ids.tolist() == scored  # type: ignore[union-attr]
        assert again.num_scored == selection.num_scored == (5 if scored is None else len(scored))
        assert again.facts == {"threshold": 0.5}
    older = {name: array for name, array in base.to_arrays().items() if name != "more"}
    assert Selection.from_arrays(older).num_scored == 1
