"""Cross-fitting: folds, running means, resuming, and small audit runs through the driver."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rayprune.core.audit.cross_fit import CrossFit, folds_of
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.engine.storage.checkpoint import load_selector_state
from rayprune.engine.train.driver import train
from rayprune.errors import ConfigError
from rayprune.methods import METHODS
from rayprune.testing import CHECKS, check_method, run_check, through_a_file
from tests.support.runs import run_config

NUM, CLASSES, EPOCHS = 23, 3, 6
LABELS = np.arange(NUM) % CLASSES
MEANS = ("probs", "loss", "margin", "correct")


def signals_at(epoch: int) -> dict[str, np.ndarray]:
    """The signals of all samples in an epoch."""
    rng = np.random.default_rng([7, epoch])
    return {
        "probs": rng.dirichlet(np.ones(CLASSES), NUM).astype(np.float32),
        "loss": rng.random(NUM).astype(np.float32),
        "logit_margin": rng.normal(size=NUM).astype(np.float32),
        "correct": rng.integers(0, 2, NUM).astype(np.float32),
    }


def run_epoch(selector: Selector, epoch: int) -> Selection:
    """Observe an epoch in batches of 5, in another order each time, and its pass over the fold."""
    selection, signals = selector.begin_epoch(epoch), signals_at(epoch)
    order = np.random.default_rng(epoch).permutation(selection.ids)
    for start in range(0, order.size, 5):
        ids = order[start : start + 5]
        selector.observe(ids, {name: values[ids] for name, values in signals.items()}, epoch)
    if isinstance(selection.sweep, np.ndarray):
        ids = selection.sweep[::-1]
        selector.observe(ids, {"probs": 1 - signals["probs"][ids]}, epoch, sweep=True)
    return selection


def selector_of(**options: int) -> Selector:
    return Selector(CrossFit(**{"folds": 4, "window": 2, "skip": 3, **options}), NUM, EPOCHS, seed=5, labels=LABELS)


@pytest.mark.parametrize(("num", "folds"), [(100, 5), (101, 4), (7, 7), (5, 1)])
def test_folds_partition_the_samples_and_every_class(num: int, folds: int) -> None:
    labels = np.random.default_rng(num).integers(0, 3, num)
    for given in (None, labels):
        of = folds_of(num, folds, seed=3, labels=given)
        sizes = np.bincount(of, minlength=folds)
        assert sizes.size == folds
        assert sizes.max() - sizes.min() <= 1
    by_class = np.stack([np.bincount(of[labels == label], minlength=folds) for label in range(3)])
    assert (by_class.max(axis=1) - by_class.min(axis=1)).max() <= 1
    np.testing.assert_array_equal(of, folds_of(num, folds, seed=3, labels=labels))


def test_folds_depend_on_the_seed_and_are_no_ranges_of_ids() -> None:
    one = folds_of(300, 3, seed=0)
    assert (one != folds_of(300, 3, seed=1)).mean() > 0.5
    assert all(np.diff(np.flatnonzero(one == fold)).max() > 3 for fold in range(3))


def test_the_runs_leave_out_each_sample_once() -> None:
    left_out = [
        Selector(CrossFit(folds=4, left_out=fold), NUM, EPOCHS, seed=5, labels=LABELS).begin_epoch(0)
        for fold in range(4)
    ]
    pruned = np.stack([selection.codes == 0 for selection in left_out])
    np.testing.assert_array_equal(pruned.sum(axis=0), 1)


def test_the_fold_is_predicted_in_the_last_epochs() -> None:
    selector = selector_of()
    selections = [selector.begin_epoch(epoch) for epoch in range(EPOCHS)]
    left_out = np.flatnonzero(folds_of(NUM, 4, 5, LABELS) == 0)
    for selection in selections:
        np.testing.assert_array_equal(np.setdiff1d(np.arange(NUM), selection.ids), left_out)
    assert [selection.sweep is not None for selection in selections] == [False] * 4 + [True] * 2
    np.testing.assert_array_equal(selections[-1].sweep, left_out)


def test_means_are_those_of_all_visits() -> None:
    selector = selector_of()
    selection = [run_epoch(selector, epoch) for epoch in range(EPOCHS)][-1]
    table, rows = selector.table, selection.ids
    late = [signals_at(epoch) for epoch in range(3, EPOCHS)]
    for column, signal in (("probs", "probs"), ("loss", "loss"), ("margin", "logit_margin")):
        np.testing.assert_allclose(table[column][rows], np.mean([each[signal] for each in late], axis=0)[rows], 1e-4)
    correct = np.mean([signals_at(epoch)["correct"] for epoch in range(EPOCHS)], axis=0)
    np.testing.assert_allclose(table["correct"][rows], correct[rows], atol=1e-6)
    out = np.setdiff1d(np.arange(NUM), rows)
    held_out = np.mean([1 - signals_at(epoch)["probs"] for epoch in (4, 5)], axis=0)
    np.testing.assert_allclose(table["held_out"][out], held_out[out], 1e-5)
    assert all(np.isnan(table[name][out]).all() for name in MEANS)
    assert np.isnan(table["held_out"][rows]).all()


def test_a_visit_that_is_observed_again_counts_once() -> None:
    selector = selector_of(skip=0)
    selection = run_epoch(selector, 0)
    before = {name: selector.table[name].copy() for name in MEANS}
    signals = {name: values[selection.ids] + 0.1 for name, values in signals_at(1).items()}
    selector.observe(selection.ids, signals, 0)
    for name in MEANS:
        np.testing.assert_array_equal(selector.table[name], before[name])
    selector.observe(selection.ids, signals, 1)
    assert (selector.table["loss"][selection.ids] != before["loss"][selection.ids]).all()


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_resumed_selector_ends_with_the_same_means(stop: int) -> None:
    whole, first, second = selector_of(), selector_of(), selector_of()
    for epoch in range(EPOCHS):
        run_epoch(whole, epoch)
        run_epoch(first if epoch < stop else second, epoch)
        if epoch == stop - 1:
            second.load_state_dict(through_a_file(first))
    for name, column in whole.table.columns.items():
        np.testing.assert_array_equal(second.table[name], column)


def test_a_single_run_trains_on_all() -> None:
    selector = selector_of(folds=1)
    for epoch in range(EPOCHS):
        selection = run_epoch(selector, epoch)
        assert selection.num_kept == NUM
        assert selection.sweep is None
    assert np.isfinite(selector.table["probs"]).all()


def test_the_contract_of_methods_holds() -> None:
    check_method(CrossFit(folds=1))


@pytest.mark.parametrize("name", [name for name in CHECKS if name != "few_samples"])  # folds need one sample each
def test_the_contract_of_methods_holds_with_folds(name: str) -> None:
    run_check(name, CrossFit(folds=5, left_out=4))


def test_it_is_not_registered() -> None:
    assert CrossFit not in METHODS.values()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 0}, "left_out 0 of 0 folds"),
        ({"folds": 3, "left_out": 3}, "left_out 3 of 3 folds"),
        ({"left_out": -1}, "left_out -1 of 5 folds"),
        ({"window": 0}, "window 0 must be at least 1"),
        ({"skip": -1}, "skip -1 at least 0"),
    ],
)
def test_mistakes(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CrossFit(**options)


def test_fewer_samples_than_folds() -> None:
    with pytest.raises(ConfigError, match="3 samples do not fill 4 folds: use fewer"):
        Selector(CrossFit(folds=4), 3, EPOCHS).begin_epoch(0)


def test_a_run_of_the_driver(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"epochs": 4}, audit={"folds": 3, "window": 2}).auditing(1)
    result = train(config)
    assert result.folder == tmp_path / "run" / "fold_2"
    state = load_selector_state(result.folder, 4)
    columns = {name.rpartition("/")[2]: column for name, column in state.items() if "/column/" in name}
    out = columns["sweeps"] > 0
    assert out.sum() == pytest.approx(301 / 3, abs=1)
    assert set(columns["sweeps"][out]) == {2}
    assert (set(columns["visits"][~out]), set(columns["late_visits"][~out])) == ({4}, {2})
    assert set(columns["visits"][out]) == {0}
    np.testing.assert_allclose(columns["held_out"][out].sum(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(columns["probs"][~out].sum(axis=1), 1, atol=1e-4)
    assert np.isnan(columns["loss"][out]).all()
    assert (columns["loss"][~out] > 0).all()
