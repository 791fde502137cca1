"""All dynamic methods in one simulated training: requested, expected and realised ratios, full epochs, first visits.

The losses of 10,000 samples fall at their own rates; some are never learned. Signals depend on the epoch and the
sample, as if the network were the same under every method.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.core import Selection, Selector
from rayprune.core.bases.dynamic import DynamicMethod, warn_once
from rayprune.core.schedule import Schedule
from rayprune.methods import METHODS, Method, build_method

NUM_SAMPLES, NUM_EPOCHS, NUM_CLASSES = 10_000, 20, 10
NAMES = sorted(name for name, cls in METHODS.items() if issubclass(cls, DynamicMethod))
# Methods that keep exactly N − floor(r·N) samples.
EXACT = ["epsilon_greedy", "eswp", "orderdp", "rcap", "ucb"]
every_method = pytest.mark.parametrize("name", NAMES)
# Options with which the methods that prune little or late by default prune within a few epochs.
EARLY: dict[str, dict[str, Any]] = {"clean_subset": {"warmup_epochs": 5}}
LINEAR = {"schedule": "linear", "start": 0.1, "end": 0.6}


def labels() -> NDArray[np.int64]:
    shares = 0.7 ** np.arange(NUM_CLASSES)
    return np.random.default_rng(0).choice(NUM_CLASSES, NUM_SAMPLES, p=shares / shares.sum())


@cache
def signals_at(epoch: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    start, rate = rng.gamma(4.0, 0.6, NUM_SAMPLES), rng.exponential(0.4, NUM_SAMPLES) * (rng.random(NUM_SAMPLES) < 0.9)
    noise = np.exp(np.random.default_rng([6, epoch]).normal(0.0, 0.1, NUM_SAMPLES))
    loss = start * np.exp(-rate * epoch) * noise + 1e-6
    prob = np.exp(-loss)
    found = {"loss": loss, "prob_label": prob, "correct": prob > 0.4, "confidence": np.maximum(prob, 0.3)}
    return {name: values.astype(np.float32) for name, values in found.items()}


def visit(selector: Selector, ids: NDArray[np.int64], epoch: int, *, sweep: bool = False) -> None:
    signals = {name: signals_at(epoch)[name][ids] for name in selector.method.signals}
    selector.observe(ids, signals, epoch, sweep=sweep)


def run(method: Method, num_epochs: int = NUM_EPOCHS, seed: int = 1) -> list[Selection]:
    selector, selections = Selector(method, NUM_SAMPLES, num_epochs, seed, labels()), []
    for epoch in range(num_epochs):
        selection = selector.begin_epoch(epoch)
        visit(selector, selection.ids, epoch)
        if selection.scored_ids is not None and selection.scored_ids.size:
            visit(selector, selection.scored_ids, epoch, sweep=True)
        selections.append(selection)
    return selections


def built(name: str, **options: Any) -> Method:
    return build_method({"name": name, **options})


def check_ratios(method: Method, selections: list[Selection]) -> None:
    """Check the conventions of Selection in every epoch, and that the run saves what they say."""
    assert isinstance(method, DynamicMethod)
    may_prune = method.pruning_epochs(NUM_EPOCHS)
    for epoch, selection in enumerate(selections):
        dropped = NUM_SAMPLES - selection.num_kept
        assert abs(dropped - selection.expected_drops) <= 1  # rounded at random for repb, exact for the others
        assert selection.expected_drops <= selection.requested * NUM_SAMPLES + 1e-6
        if epoch not in may_prune and method.name != "seta":
            assert (dropped, selection.requested, selection.lr_scale) == (0, 0.0, 1.0)
    visits = sum(selection.num_kept for selection in selections)
    expected = sum(NUM_SAMPLES - selection.expected_drops for selection in selections)
    assert abs(visits - expected) <= NUM_EPOCHS
    assert selections[-1].facts["budget_so_far"] == round(visits / (NUM_SAMPLES * NUM_EPOCHS), 6)


@every_method
def test_realised_ratios_are_those_requested_over_a_run(name: str) -> None:
    method = built(name)
    selections = run(method)
    check_ratios(method, selections)
    assert any(selection.realised > 0.05 for selection in selections)
    assert selections[0].num_kept == NUM_SAMPLES


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("prune_ratio", [0.3, 0.9995, LINEAR])
def test_numbers_are_exact_with_ratios_and_schedules(name: str, prune_ratio: Any) -> None:
    method = built(name, prune_ratio=prune_ratio, anneal_start=0.9)
    assert isinstance(method, DynamicMethod)
    schedule, may_prune = Schedule.of(prune_ratio), method.pruning_epochs(NUM_EPOCHS)
    assert may_prune == range(1, 18)
    selections = run(method)
    check_ratios(method, selections)
    for epoch, selection in enumerate(selections):
        ratio = schedule(epoch, NUM_EPOCHS) if epoch in may_prune else 0.0
        assert selection.requested == ratio
        assert selection.num_kept == NUM_SAMPLES - int(ratio * NUM_SAMPLES + 1e-9)


@pytest.mark.parametrize("name", ["kakurenbo", "repb", "seta"])
def test_the_schedule_is_the_ratio_of_methods_with_rules_of_their_own(name: str) -> None:
    drops = []
    for prune_ratio in (0.2, 0.6):
        method = built(name, prune_ratio=prune_ratio)
        check_ratios(method, selections := run(method))
        drops.append(sum(selection.expected_drops for selection in selections))
    assert drops[1] > 1.5 * drops[0] > 0


@every_method
def test_the_last_epochs_are_full_after_anneal_start(name: str) -> None:
    options = {"prune_ratio": 0.0} if name == "seta" else EARLY.get(name, {})
    selections = run(built(name, anneal_start=0.5, **options))
    assert any(selection.realised for selection in selections[:10])
    assert not any(selection.realised for selection in selections[10:])
    # No pass whose scores no later epoch reads.
    assert all(selection.num_scored == 0 for selection in selections[9:])
    assert sum(selection.num_scored for selection in selections) > 0 or name not in ("kakurenbo", "pdd")


@every_method
def test_samples_without_a_score_are_kept(name: str) -> None:
    method = built(name, **({"prune_ratio": 0.5} if name in ("orderdp", "rcap") else EARLY.get(name, {})))
    selector = Selector(method, NUM_SAMPLES, NUM_EPOCHS, 1, labels())
    missing = np.arange(3, NUM_SAMPLES, 500)
    for epoch in range(8):  # ies needs six losses
        visit(selector, np.setdiff1d(np.arange(NUM_SAMPLES), missing), epoch)
    selection = selector.begin_epoch(8)
    assert selection.realised > 0
    kept = np.isin(missing, selection.ids)
    # The pool of orderdp and the random share of seta leave out a part of all samples, whatever their scores.
    assert kept.mean() >= (0.4 if name in ("orderdp", "seta") else 1.0)
    nothing_seen = Selector(method, NUM_SAMPLES, NUM_EPOCHS, 1, labels()).begin_epoch(8)
    assert nothing_seen.realised == pytest.approx(0.1 if name == "seta" else 0.0)


@every_method
def test_a_second_observation_in_one_epoch_changes_nothing(name: str) -> None:
    method = built(name)
    once, twice = (Selector(method, NUM_SAMPLES, NUM_EPOCHS, 1, labels()) for _ in range(2))
    everyone = np.arange(NUM_SAMPLES)
    for epoch in range(3):
        visit(once, everyone, epoch)
        visit(twice, everyone[::2], epoch)
        visit(twice, everyone, epoch)
    assert all(column.tobytes() == twice.table[key].tobytes() for key, column in once.table.columns.items())
    assert (once.begin_epoch(3).codes == twice.begin_epoch(3).codes).all()


@every_method
def test_the_control_keeps_as_many_with_other_ids(name: str) -> None:
    own, control = run(built(name)), run(build_method({"name": "shuffled", "of": name}))
    check_ratios(built(name), control)
    pruned = [epoch for epoch, selection in enumerate(own) if selection.realised > 0.05]
    assert any((own[epoch].codes != control[epoch].codes).any() for epoch in pruned)
    if name in EXACT:
        assert [selection.num_kept for selection in own] == [selection.num_kept for selection in control]


@every_method
def test_an_epoch_depends_on_seed_and_table_only(name: str) -> None:
    def selector_at(order: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Selection:
        selector = Selector(built(name), NUM_SAMPLES, NUM_EPOCHS, 2, labels())
        for epoch in range(7):
            for ids in np.array_split(order(np.arange(NUM_SAMPLES)), 7):
                visit(selector, ids, epoch)
        return selector.begin_epoch(7)

    shuffle = np.random.default_rng(0).permutation
    assert (selector_at(lambda ids: ids).codes == selector_at(shuffle).codes).all()


@every_method
def test_huge_equal_and_zero_losses(name: str) -> None:
    for value in (0.0, 1.0, 3e38):
        selector = Selector(built(name), 100, NUM_EPOCHS, 0, labels()[:100])
        ids = np.arange(100)
        with np.errstate(all="raise", under="ignore"):
            for epoch in range(NUM_EPOCHS):
                selection = selector.begin_epoch(epoch)
                assert selection.num_kept >= 1
                signals = dict.fromkeys(("prob_label", "correct", "confidence"), np.ones(100))
                selector.observe(ids, {**signals, "loss": np.where(ids == 99, value / 2, value)}, epoch)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_too_short_to_prune_warns_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Selector(built(name, anneal_start=0.1), 5, 8, labels=np.arange(5)).begin_epoch(0)
            Selector(built(name, anneal_start=1.0), 5, 8, labels=np.arange(5)).begin_epoch(0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{name} never prunes with num_epochs = 8 and anneal_start 0.1")
    assert "train longer" in line


@every_method
@pytest.mark.parametrize("value", [-0.1, 1.5, True])
def test_anneal_start_is_a_share(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="anneal_start"):
        built(name, anneal_start=value)
