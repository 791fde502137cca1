"""Conformance of every registered method; no method is named here, so registering a new one tests it.

Shapes: N samples, B observed, C classes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

import rayprune
from rayprune.core import Schedule, Selection, Selector
from rayprune.core.method import Kind
from rayprune.methods import METHODS, Method, build_method

NUM_SAMPLES, NUM_EPOCHS, NUM_CLASSES = 41, 16, 4
# Deliberately unbalanced; the last class has one sample.
LABELS = np.repeat(np.arange(NUM_CLASSES), [25, 10, 5, 1])


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
UNBIASED = {key: config for key, config in VARIANTS.items() if build_method(config).unbiased}
every_unbiased_method = pytest.mark.parametrize(
    "method", [build_method(c) for c in UNBIASED.values()], ids=list(UNBIASED)
)
every_class = pytest.mark.parametrize("cls", [METHODS[n] for n in sorted(METHODS)], ids=sorted(METHODS))


def observed(
    method: Method, ids: NDArray[np.int64], epoch: int, world: int = 0, names: tuple[str, ...] = ()
) -> dict[str, NDArray[Any]]:
    """Draw the workers' signals; a sample's numbers depend on (world, epoch, id) alone."""
    rng = np.random.default_rng([77, world, epoch])
    num = int(ids.max(initial=0)) + NUM_SAMPLES
    signals: dict[str, NDArray[Any]] = {}
    for name in sorted(names or method.signals):
        if name == "boundary_classes":
            signals[name] = rng.exponential(size=(num, NUM_CLASSES))[ids]
        elif name == "probs":
            signals[name] = rng.dirichlet(np.ones(NUM_CLASSES), size=num)[ids]
        elif name == "embedding":
            signals[name] = rng.normal(size=(num, 3))[ids]
        elif name == "correct":
            signals[name] = (rng.random(num) < 0.6)[ids]
        elif name in {"confidence", "prob_label"}:
            signals[name] = rng.random(num)[ids]
        elif name == "margin":
            signals[name] = rng.uniform(-1, 1, num)[ids]
        else:
            signals[name] = rng.exponential(size=num)[ids]
    return signals


def selector_of(method: Method, num_samples: int = NUM_SAMPLES, seed: int = 3) -> Selector:
    labels = LABELS[::-1][:num_samples]
    return Selector(method, num_samples, NUM_EPOCHS, seed, labels=labels, chosen=chosen_of(num_samples))


def chosen_of(num_samples: int) -> Selection:
    """Return the selection for a method that reads one from a file."""
    return Selection.of_ids(np.arange(0, num_samples, 2), num_samples)


def visit(selector: Selector, selection: Selection, epoch: int) -> None:
    ids = np.union1d(selection.ids, selection.forward_only_ids)
    selector.observe(ids, observed(selector.method, ids, epoch), epoch)
    sweep(selector, selection, epoch)


def sweep(selector: Selector, selection: Selection, epoch: int) -> None:
    """Make the forward-only pass that the selection requests, in two parts."""
    if selection.sweep is not None:
        ids = np.arange(NUM_SAMPLES)[: selection.num_samples] if isinstance(selection.sweep, str) else selection.sweep
        for part in np.array_split(ids, 2):
            signals = observed(selector.method, part, epoch, names=selector.method.sweep_signals)
            selector.observe(part, signals, epoch, sweep=True)


def epochs_run(method: Method) -> int:
    """Return how many epochs to run: those on all samples, if the method needs them, and four more."""
    return method.collect_epochs + 4


def run(selector: Selector, epochs: range | None = None) -> list[Selection]:
    selections = []
    for epoch in range(epochs_run(selector.method)) if epochs is None else epochs:
        selections.append(selector.begin_epoch(epoch))
        visit(selector, selections[-1], epoch)
    return selections


def fingerprint(selection: Selection) -> tuple[Any, ...]:
    numbers = (selection.requested, selection.expected_drops, selection.lr_scale)
    arrays = (selection.ids, selection.weights, selection.forward_only_ids)
    return numbers + tuple((a.dtype.str, a.tobytes()) for a in arrays)


def fingerprints(selections: list[Selection]) -> list[tuple[Any, ...]]:
    return [fingerprint(selection) for selection in selections]


def same_scores(left: Selector, right: Selector) -> bool:
    ours, theirs = left.scores(), right.scores()
    return ours.keys() == theirs.keys() and all(ours[k].tobytes() == theirs[k].tobytes() for k in ours)


def through_a_file(selector: Selector) -> dict[str, NDArray[Any]]:
    file = io.BytesIO()
    np.savez(file, **selector.state_dict())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def check_valid(selection: Selection, num_samples: int) -> None:
    ids, weights = selection.ids, selection.weights
    assert ids.dtype == np.int64
    assert weights.dtype == np.float32
    assert ids.shape == weights.shape
    assert 1 <= ids.size == np.unique(ids).size == selection.num_kept
    assert ids.min() >= 0
    assert ids.max() < num_samples
    assert np.isfinite(weights).all()
    # If a batch trains with the mean of its weights, the lowest weight may be 0.
    assert (weights >= 0).all() if selection.batch_mean_weights else (weights > 0).all()
    assert weights.any()
    assert np.intersect1d(ids, selection.forward_only_ids).size == 0
    assert 0 <= selection.requested < 1
    assert selection.realised == 1 - ids.size / num_samples


def is_plain(value: Any) -> bool:
    if type(value) is list:
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    return type(value) in {str, int, float, bool, type(None)}


@every_class
def test_the_class_attributes_are_complete(cls: type[Method]) -> None:
    method = cls()
    assert method.kind in get_args(Kind)
    assert method.paper
    assert cls.__doc__
    assert method.signals
    assert all(isinstance(signal, str) for signal in method.signals)
    assert getattr(rayprune, cls.__name__) is cls
    assert cls.__name__ in dir(rayprune)


@every_method
def test_the_config_round_trips(method: Method) -> None:
    config = method.to_config()
    assert is_plain(config)
    assert yaml.safe_load(yaml.safe_dump(config)) == config == json.loads(json.dumps(config))
    again = build_method(config)
    assert again == method
    assert hash(again) == hash(method)
    assert again.to_config() == config


@every_method
def test_hyperparameters_are_frozen(method: Method) -> None:
    for field in dataclasses.fields(method):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, None)


@every_class
def test_an_unknown_key_is_refused_with_the_closest(cls: type[Method]) -> None:
    for field in dataclasses.fields(cls):
        with pytest.raises(
            ValueError, match=f"unknown key 'method.{field.name}x' of method.*did you mean '{field.name}'"
        ):
            build_method({"name": cls.name, f"{field.name}x": 1})


@every_method
def test_selections_are_valid(method: Method) -> None:
    for selection in run(selector_of(method)):
        check_valid(selection, NUM_SAMPLES)


@every_method
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_a_few_samples_suffice(method: Method, num_samples: int) -> None:
    for seed in range(10):
        for selection in run(selector_of(method, num_samples, seed), range(NUM_EPOCHS)):
            check_valid(selection, num_samples)


@every_method
def test_the_seed_determines_the_selections(method: Method) -> None:
    one, two = run(selector_of(method)), run(selector_of(method))
    assert fingerprints(one) == fingerprints(two)
    draws_at_random = method.unbiased or method.kind in {"baseline", "control"}
    if draws_at_random and any(selection.realised for selection in one):
        assert any(fingerprints(one) != fingerprints(run(selector_of(method, seed=seed))) for seed in range(4, 8))


@every_method
def test_begin_epoch_is_idempotent(method: Method) -> None:
    selector = selector_of(method)
    pruned = np.zeros(NUM_SAMPLES, dtype=int)
    for epoch in range(epochs_run(method)):
        first = fingerprint(selector.begin_epoch(epoch))
        assert fingerprint(selector.begin_epoch(epoch)) == first
        visit(selector, selector.begin_epoch(epoch), epoch)
        assert fingerprint(selector.begin_epoch(epoch)) == first
        pruned += selector.begin_epoch(epoch).codes == 0
    assert selector.table.times_pruned.tolist() == pruned.tolist()


@every_method
@pytest.mark.parametrize("mid_epoch", [False, True])
def test_a_restored_state_continues_identically(method: Method, mid_epoch: bool) -> None:
    selector = selector_of(method)
    run(selector, range(2))
    current = selector.begin_epoch(2)
    half = current.ids[: current.num_kept // 2] if mid_epoch else current.ids[:0]
    selector.observe(half, observed(method, half, 2), 2)
    restored = selector_of(method)
    restored.load_state_dict(through_a_file(selector))
    assert fingerprint(restored.begin_epoch(2)) == fingerprint(current)
    assert same_scores(restored, selector)
    rest = range(2, epochs_run(method) + 2)
    assert fingerprints(run(restored, rest)) == fingerprints(run(selector, rest))
    assert same_scores(restored, selector)
    assert restored.table.times_pruned.tolist() == selector.table.times_pruned.tolist()


@every_method
def test_a_pickled_selector_continues_identically(method: Method) -> None:
    selector = selector_of(method)
    run(selector, range(2))
    copy = pickle.loads(pickle.dumps(selector))
    rest = range(2, epochs_run(method))
    assert fingerprints(run(copy, rest)) == fingerprints(run(selector, rest))


@every_method
def test_the_order_of_observations_does_not_matter(method: Method) -> None:
    whole, parts = selector_of(method), selector_of(method)
    for epoch in range(epochs_run(method)):
        visit(whole, whole.begin_epoch(epoch), epoch)
        selection = parts.begin_epoch(epoch)
        assert fingerprint(whole.begin_epoch(epoch)) == fingerprint(selection)
        ids = np.random.default_rng(epoch).permutation(np.union1d(selection.ids, selection.forward_only_ids))
        for batch in np.array_split(ids, 5):
            parts.observe(batch, observed(method, batch, epoch), epoch)
        sweep(parts, selection, epoch)
    assert same_scores(whole, parts)


@every_class
def test_a_repeated_observation_counts_once(cls: type[Method]) -> None:
    once, twice = selector_of(cls()), selector_of(cls())
    num_epochs = epochs_run(once.method)
    for epoch in range(num_epochs):
        visit(once, once.begin_epoch(epoch), epoch)
        for _ in range(2):
            visit(twice, twice.begin_epoch(epoch), epoch)
    assert same_scores(once, twice)
    assert fingerprint(once.begin_epoch(num_epochs)) == fingerprint(twice.begin_epoch(num_epochs))


@every_unbiased_method
@pytest.mark.parametrize("class_floor", [0.0, 0.5])
def test_unbiased_methods_are_unbiased(method: Method, class_floor: float) -> None:
    method = build_method({**method.to_config(), "class_floor": class_floor})
    num, num_draws = 20, 300
    ids = np.arange(num)
    values_VN = np.stack([np.ones(num), np.arange(num) ** 2.0, observed(method, ids, 0)[method.signals[0]]])
    sums = []
    for seed in range(num_draws):
        selector = Selector(method, num, NUM_EPOCHS, seed, labels=np.arange(num) // 7)
        selector.observe(ids, observed(method, ids, 0), 0)
        selection = selector.begin_epoch(1)
        sums.append(values_VN[:, selection.ids] @ selection.weights.astype(np.float64))
    mean_V, error_V = np.mean(sums, axis=0), np.std(sums, axis=0) / np.sqrt(num_draws)
    # 1e-6 for weights that are float32.
    assert (np.abs(mean_V - values_VN.sum(axis=1)) <= 4.5 * error_V + 1e-6 * values_VN.sum(axis=1)).all()


@every_method
@pytest.mark.parametrize("class_floor", [0.3, 0.9, 1.0])
def test_the_class_floor_holds(method: Method, class_floor: float) -> None:
    floored = build_method({**method.to_config(), "class_floor": class_floor})
    least_C = np.ceil(np.bincount(LABELS) * class_floor - 1e-9)
    for seed in range(3):
        selector = selector_of(floored, seed=seed)
        for selection in run(selector, range(NUM_EPOCHS)):
            check_valid(selection, NUM_SAMPLES)
            kept_C = np.bincount(selector.labels[selection.ids], minlength=NUM_CLASSES)  # type: ignore[index]
            assert (kept_C >= least_C).all()


@every_method
def test_a_class_floor_without_labels_is_refused(method: Method) -> None:
    floored = build_method({**method.to_config(), "class_floor": 0.5})
    with pytest.raises(ValueError, match=r"class_floor 0\.5 needs labels"):
        Selector(floored, NUM_SAMPLES, NUM_EPOCHS)


@every_method
def test_an_epoch_prunes_if_and_only_if_requested(method: Method) -> None:
    selections = run(selector_of(method), range(NUM_EPOCHS))
    for selection in selections:
        assert (selection.requested > 0) == (selection.num_kept < NUM_SAMPLES)
    if isinstance(getattr(method, "prune_ratio", None), Schedule):
        assert any(selection.requested > 0 for selection in selections)
    if method.collect_epochs:
        scoring, subsets = selections[: method.collect_epochs], selections[method.collect_epochs :]
        assert all(selection.num_kept == NUM_SAMPLES for selection in scoring)
        assert subsets
        assert all(selection.num_kept < NUM_SAMPLES for selection in subsets)
        assert {selection.ids.tobytes() for selection in subsets} == {subsets[0].ids.tobytes()}


@every_method
def test_the_global_generator_is_not_used(method: Method) -> None:
    before = np.random.get_state()  # noqa: NPY002
    run(selector_of(method))
    after = np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert before[1].tobytes() == after[1].tobytes()  # type: ignore[union-attr]
    assert before[2:] == after[2:]


@every_method
def test_every_declared_signal_is_required(method: Method) -> None:
    ids = np.arange(5)
    for missing in method.signals:
        selector = selector_of(method)
        signals = {name: array for name, array in observed(method, ids, 0).items() if name != missing}
        with pytest.raises(ValueError, match=f"signal '{missing}' is missing"):
            selector.observe(ids, signals, 0)
        assert not selector.table.visited.any()


@every_method
def test_a_past_epoch_is_refused(method: Method) -> None:
    selector = selector_of(method)
    run(selector, range(2))
    with pytest.raises(ValueError, match="epoch 0 is over: epoch 1 has begun"):
        selector.begin_epoch(0)
    ids = np.arange(3)
    with pytest.raises(ValueError, match="observation of epoch 0, but epoch 1"):
        selector.observe(ids, observed(method, ids, 0), 0)


@every_method
def test_scores_are_copies_with_one_number_per_sample(method: Method) -> None:
    selector = selector_of(method)
    run(selector, range(1))
    scores = selector.scores()
    assert scores
    for column in scores.values():
        assert column.shape == (NUM_SAMPLES,)
        column[:] = 0
    assert not any((column == 0).all() for column in selector.scores().values())


@every_method
def test_large_seeds_and_epochs_work(method: Method) -> None:
    selector = Selector(method, NUM_SAMPLES, 100_000, 2**40 + 1, labels=LABELS, chosen=chosen_of(NUM_SAMPLES))
    selector.observe(np.arange(NUM_SAMPLES), observed(method, np.arange(NUM_SAMPLES), 0), 0)
    if method.collect_epochs:
        with pytest.raises(ValueError, match="were not visited in epoch"):
            selector.begin_epoch(70_000)
        for epoch in range(1, method.collect_epochs):
            selector.observe(np.arange(NUM_SAMPLES), observed(method, np.arange(NUM_SAMPLES), epoch), epoch)
    if method.sweep_signals:
        with pytest.raises(ValueError, match="have no distance"):
            selector.begin_epoch(70_000)
        sweep(selector, dataclasses.replace(Selection.full(NUM_SAMPLES), sweep="all"), 0)
    selection = selector.begin_epoch(np.int64(70_000))  # type: ignore[arg-type]
    check_valid(selection, NUM_SAMPLES)
    restored = Selector(method, NUM_SAMPLES, 100_000, 2**40 + 1, labels=LABELS, chosen=chosen_of(NUM_SAMPLES))
    restored.load_state_dict(through_a_file(selector))
    assert fingerprint(restored.begin_epoch(70_000)) == fingerprint(selection)
    assert int(selector.table.times_pruned.max()) <= 1
