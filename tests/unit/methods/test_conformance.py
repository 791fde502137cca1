"""Conformance of every registered method; no method is named here, so registering a new one tests it.

The checks of a method are those of `rayprune.testing`, which users run on methods of their own. The other tests are of
the registry, and of the Selector with every method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml

import rayprune
from rayprune.core import Schedule, Selection, Selector
from rayprune.core.bases.in_batch import Candidates, InBatchMethod
from rayprune.methods import METHODS, Method, build_method
from rayprune.testing import (
    CHECKS,
    NUM_EPOCHS,
    NUM_SAMPLES,
    SyntheticBatches,
    SyntheticRun,
    check_selection,
    fingerprint,
    labels_of,
    run_check,
    signals_of,
    through_a_file,
)


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (test id, config) per method: defaults, other ratios and schedules, flipped switches, inner methods."""
    plain = [name for name, cls in METHODS.items() if not any(isinstance(v, Method) for v in vars(cls()).values())]
    for name, cls in sorted(METHODS.items()):
        yield name, {"name": name}
        for field in dataclasses.fields(cls):
            value = getattr(cls(), field.name)
            others: list[Any] = []
            if isinstance(value, Schedule):
                others = [0.3, {"schedule": "linear", "start": 0.2, "end": 0.6}]
            elif isinstance(value, bool):
                others = [not value]
            elif isinstance(value, Method):
                others = [{"name": inner} for inner in sorted(plain) if inner not in {value.name, "fixed"}]
            for number, other in enumerate(others):
                yield f"{name}-{field.name}{number}", {"name": name, field.name: other}


VARIANTS = dict(variants())
every_method = pytest.mark.parametrize("method", [build_method(c) for c in VARIANTS.values()], ids=list(VARIANTS))
IN_BATCH = {name: method for name, config in VARIANTS.items() if (method := build_method(config)).kind == "in_batch"}
every_in_batch = pytest.mark.parametrize("method", IN_BATCH.values(), ids=list(IN_BATCH))
every_class = pytest.mark.parametrize("cls", [METHODS[n] for n in sorted(METHODS)], ids=sorted(METHODS))


@every_method
@pytest.mark.parametrize("check", CHECKS)
def test_the_method_passes(check: str, method: Method) -> None:
    run_check(check, method)


@every_class
def test_the_class_is_public(cls: type[Method]) -> None:
    assert getattr(rayprune, cls.__name__) is cls
    assert cls.__name__ in dir(rayprune)


@every_method
def test_the_registry_builds_it_from_its_config(method: Method) -> None:
    config = method.to_config()
    assert yaml.safe_load(yaml.safe_dump(config)) == config
    assert build_method(config) == method


@every_class
def test_an_unknown_key_is_refused_with_the_closest(cls: type[Method]) -> None:
    for field in dataclasses.fields(cls):
        with pytest.raises(
            ValueError, match=f"unknown key 'method.{field.name}x' of method.*did you mean '{field.name}'"
        ):
            build_method({"name": cls.name, f"{field.name}x": 1})


@every_method
def test_the_seed_changes_what_baselines_and_controls_draw(method: Method) -> None:
    selections = SyntheticRun(method).run()
    if method.kind in {"baseline", "control"} and any(selection.realised for selection in selections):
        drawn = {tuple(map(fingerprint, SyntheticRun(method, seed=seed).run())) for seed in range(3, 8)}
        assert len(drawn) > 1


@every_method
def test_begin_epoch_is_idempotent(method: Method) -> None:
    run = SyntheticRun(method)
    pruned = np.zeros(NUM_SAMPLES, dtype=int)
    for epoch in range(run.num_epochs):
        first = fingerprint(run.selector.begin_epoch(epoch))
        assert fingerprint(run.selector.begin_epoch(epoch)) == first
        assert fingerprint(run.visit(epoch)) == first
        pruned += run.selector.begin_epoch(epoch).codes == 0
    assert run.selector.table.times_pruned.tolist() == pruned.tolist()


@every_class
def test_a_repeated_observation_counts_once(cls: type[Method]) -> None:
    once, twice = SyntheticRun(cls()), SyntheticRun(cls())
    for epoch in range(once.num_epochs - 1):
        once.visit(epoch)
        for _ in range(2):
            twice.visit(epoch)
    last = once.num_epochs - 1
    assert fingerprint(once.selector.begin_epoch(last)) == fingerprint(twice.selector.begin_epoch(last))
    for name, column in once.selector.scores().items():
        assert column.tobytes() == twice.selector.scores()[name].tobytes()


@every_method
def test_a_class_floor_without_labels_is_refused(method: Method) -> None:
    if method.step()[0] == "in_batch":
        with pytest.raises(ValueError, match="chooses inside batches"):
            dataclasses.replace(method, class_floor=0.5)
        return
    floored = dataclasses.replace(method, class_floor=0.5)
    with pytest.raises(ValueError, match=r"class_floor 0\.5 needs labels"):
        Selector(floored, NUM_SAMPLES, NUM_EPOCHS)


@every_method
def test_every_declared_signal_is_required(method: Method) -> None:
    ids = np.arange(5)
    for missing in method.signals:
        selector = SyntheticRun(method).selector
        signals = {name: array for name, array in signals_of(method.signals, ids, 0).items() if name != missing}
        with pytest.raises(ValueError, match=f"signal '{missing}' is missing"):
            selector.observe(ids, signals, 0)
        assert not selector.table.visited.any()


@every_method
def test_a_past_epoch_is_refused(method: Method) -> None:
    run = SyntheticRun(method)
    run.run(range(2))
    with pytest.raises(ValueError, match="epoch 0 is over: begin epoch 1"):
        run.selector.begin_epoch(0)
    with pytest.raises(ValueError, match="epoch 0 is over: observe samples of epoch 1"):
        run.observe(np.arange(3), 0)


@every_method
def test_scores_are_copies(method: Method) -> None:
    run = SyntheticRun(method)
    run.run(range(1))
    for column in run.selector.scores().values():
        column[:] = 0
    assert not any((column == 0).all() for column in run.selector.scores().values())


@every_method
def test_large_seeds_and_epochs_work(method: Method) -> None:
    run = SyntheticRun(method, num_epochs=100_000, seed=2**40 + 1)
    everything = np.arange(NUM_SAMPLES)
    run.observe(everything, 0)
    if method.collect_epochs:
        with pytest.raises(ValueError, match="were not visited in epoch"):
            run.selector.begin_epoch(70_000)
        for epoch in range(1, method.collect_epochs):
            run.observe(everything, epoch)
    if method.sweep_signals:
        with pytest.raises(ValueError, match="have no "):
            run.selector.begin_epoch(70_000)
        newest = max(method.collect_epochs - 1, 0)
        run.sweep(dataclasses.replace(Selection.full(NUM_SAMPLES), sweep="all"), newest)
    selection = run.selector.begin_epoch(np.int64(70_000))  # type: ignore[arg-type]
    check_selection(selection, NUM_SAMPLES, "epoch 70000")
    restored = SyntheticRun(method, num_epochs=100_000, seed=2**40 + 1)
    restored.selector.load_state_dict(through_a_file(run.selector))
    assert fingerprint(restored.selector.begin_epoch(70_000)) == fingerprint(selection)
    assert int(run.selector.table.times_pruned.max()) <= 1


@every_in_batch
@pytest.mark.parametrize("size", [1, 2, 7, NUM_SAMPLES])
def test_rows_in_another_order_are_picked_all_the_same(method: InBatchMethod, size: int) -> None:
    for seed in range(5):
        batches, ids = SyntheticBatches(method, seed), np.arange(size)
        picked = batches.pick(ids, step=seed)
        assert picked
        assert batches.pick(np.random.default_rng(seed).permutation(ids), step=seed) == picked


@every_in_batch
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_diverged_rows_are_never_picked_and_change_no_pick(method: InBatchMethod, number: float) -> None:
    batches, ids = SyntheticBatches(method), np.arange(NUM_SAMPLES)
    signals = batches.signals(ids)
    for array in signals.values():
        array[::3] = number
    picked = batches.pick(ids, signals=signals)
    assert all(id % 3 for id in picked)
    assert picked == batches.pick(ids[ids % 3 > 0])
    assert not batches.pick(ids, signals={name: np.full_like(array, number) for name, array in signals.items()})


@every_in_batch
def test_padding_is_never_picked(method: InBatchMethod) -> None:
    batches, ids = SyntheticBatches(method), np.arange(NUM_SAMPLES)
    real = ids >= NUM_SAMPLES - 9
    candidates = Candidates(batches.signals(ids), batches.context(ids, 0), real)
    rows, weights = candidates.pick(method)
    assert dict(zip(ids[rows].tolist(), weights.tolist(), strict=True)) == batches.pick(ids[real])


def test_the_synthetic_classes_are_unbalanced() -> None:
    assert np.bincount(labels_of(NUM_SAMPLES)).tolist() == [1, 5, 10, 25]
