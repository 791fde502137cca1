"""Check that a selection method of your own does what training relies on.

    from rayprune.testing import check_method

    check_method(MyMethod)                                 # a class, or an instance with other hyperparameters
    check_method("examples/keep_hardest.py:KeepHardest")   # a name or a reference, as in a config

The method runs on random signals of a few dozen samples, without torch, Ray or a network, for about a second.

Shapes: N samples, B observed, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import json
import pickle
import random
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from itertools import product
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.in_batch import BatchContext, Candidates, InBatchMethod, StepContext, num_picked
from rayprune.core.method import EpochContext, Kind, Method
from rayprune.core.schedule import Schedule
from rayprune.core.selection import Selection
from rayprune.core.selector import Observations, Selector, table_columns
from rayprune.core.table import ScoreTable
from rayprune.core.vectors import VectorColumn
from rayprune.errors import ConfigError, one_line
from rayprune.methods import build_method

__all__ = ["check_method"]

NUM_SAMPLES, NUM_EPOCHS, NUM_CLASSES = 41, 16, 4
_CLASS_ENDS = (0.02, 0.15, 0.4)  # shares of the samples: deliberately unbalanced, and of 41 samples class 0 has one
Check = Callable[[Method, int], None]
CHECKS: dict[str, Check] = {}
_CURES: dict[str, str] = {}


def check_method(method: type[Method] | Method | str | Mapping[str, Any], *, num_epochs: int = NUM_EPOCHS) -> None:
    """Check a method: signals, selections, weights, randomness, resuming, class floors and the number of kept samples.

    Args:
        method: a class, checked with its default hyperparameters; an instance; or a name, `path/to/file.py:Class`,
            `module:Class` or mapping, as in a config.
        num_epochs: the length of the runs; set it higher for a method that prunes later than that.

    Raises:
        AssertionError: one line that names the method, the failure and the cure.
        ConfigError: there is no such method.

    >>> from rayprune import RandomEpoch
    >>> check_method(RandomEpoch)
    """
    if isinstance(method, type) and not issubclass(method, Method):
        raise ConfigError(
            f"{method.__name__} is not a subclass of rayprune.Method: write class {method.__name__}(Method)"
        )
    try:
        built = method() if isinstance(method, type) else build_method(method)
    except TypeError as error:
        raise ConfigError(f"{one_line(error)}: give check_method an instance, with its hyperparameters") from None
    for name in CHECKS:
        run_check(name, built, num_epochs)


def run_check(name: str, method: Method, num_epochs: int = NUM_EPOCHS) -> None:
    """Run one of the CHECKS.

    Raises:
        AssertionError: one line that names the method, the failure and the cure.
    """
    label = type(method).__name__
    try:
        CHECKS[name](method, num_epochs)
    except _Failure as failure:
        raise AssertionError(f"{label}: {one_line(failure)}: {_CURES[name]}") from None
    except Exception as error:
        kind = type(error).__name__
        raise AssertionError(f"{label}: check {name!r} raised {kind} ({one_line(error)}): {_CURES[name]}") from error


class _Failure(Exception):
    """What a method does wrong."""


def _require(holds: Any, failure: str) -> None:
    if not holds:
        raise _Failure(failure)


def _check(cure: str) -> Callable[[Check], Check]:
    """Add a function to CHECKS under its name; a failure ends with the cure."""

    def add(function: Check) -> Check:
        name = function.__name__.removeprefix("_")
        CHECKS[name], _CURES[name] = function, cure
        return function

    return add


class _Declared(dict[str, Any]):
    """A dictionary that says which declaration a missing key lacks."""

    def __init__(self, items: Mapping[str, Any], what: str) -> None:
        super().__init__(items)
        self.what = what

    def __missing__(self, key: str) -> Any:
        raise _Failure(f"it reads the {self.what} {key!r}, which it does not declare")

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if self.what == "signal" else super().get(key, default)


class SyntheticRun:
    """A method in a run on random signals, which depend on the epoch and the sample's id alone.

    Args:
        method: the run gets a new instance with the same hyperparameters, and thus without any state of other runs.
        num_epochs: E; at least four more than the method's `collect_epochs`.
        num_samples: N.
        seed: of the run.
        labels: whether the samples have classes.
    """

    def __init__(
        self,
        method: Method,
        num_epochs: int = NUM_EPOCHS,
        num_samples: int = NUM_SAMPLES,
        *,
        seed: int = 3,
        labels: bool = True,
    ) -> None:
        self.num_epochs = max(num_epochs, method.collect_epochs + 4)
        # For a method that reads its selection from a file.
        chosen = Selection.of_ids(np.arange(0, num_samples, 2), num_samples)
        labels_N = labels_of(num_samples) if labels else None
        self.selector = Selector(
            dataclasses.replace(method), num_samples, self.num_epochs, seed, labels_N, chosen=chosen
        )

    def visit(self, epoch: int) -> Selection:
        """Begin an epoch, and observe the samples that it trains on or scores."""
        selection = self.selector.begin_epoch(epoch)
        self.observe(selection.ids, epoch)
        self.sweep(selection, epoch)
        return selection

    def observe(self, ids: NDArray[np.int64], epoch: int) -> None:
        """Observe the samples' signals."""
        self.selector.observe(ids, signals_of(self.selector.method.signals, ids, epoch), epoch)

    def sweep(self, selection: Selection, epoch: int) -> None:
        """Make the forward-only pass that the selection requests, in two parts."""
        method, scored = self.selector.method, selection.scored_ids
        for ids in np.array_split(np.arange(selection.num_samples) if scored is None else scored, 2):
            signals = signals_of(method.sweep_signals or method.signals, ids, epoch)
            self.selector.observe(ids, signals, epoch, sweep=True)

    def run(self, epochs: Iterable[int] | None = None) -> list[Selection]:
        """Visit the epochs, by default all; return their selections."""
        return [self.visit(epoch) for epoch in (range(self.num_epochs) if epochs is None else epochs)]

    def context(self, epoch: int) -> EpochContext:
        """Return the context in which the Selector calls `select`."""
        of = self.selector
        before = of.visits_before + (of.begin_epoch(of.epoch).num_kept if of.epoch >= 0 else 0)
        return EpochContext(
            epoch, of.num_epochs, of.num_samples, of.seed, of.labels, of.method.class_floor, before, of.chosen
        )


def labels_of(num_samples: int) -> NDArray[np.int64]:
    """Return the labels of N samples, (N,) int64."""
    return np.searchsorted(_CLASS_ENDS, (np.arange(num_samples) + 0.5) / num_samples).astype(np.int64)


def signals_of(names: Iterable[str], ids: NDArray[np.int64], epoch: int) -> dict[str, NDArray[np.float32]]:
    """Draw signals, name → (B,) or (B, C) float32; a name that rayprune does not know is (B,) and above 0."""
    num = max(NUM_SAMPLES, 1 << int(ids.max(initial=0)).bit_length())
    return {name: _drawn(name, epoch, num)[ids] for name in names}


@lru_cache(maxsize=256)
def _drawn(name: str, epoch: int, num: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([77, epoch, *name.encode()])
    drawn: NDArray[Any]
    match name:
        case "probs":
            drawn = rng.dirichlet(np.ones(NUM_CLASSES), size=num)
        case "boundary_classes":
            drawn = rng.exponential(size=(num, NUM_CLASSES))
        case "embedding":
            drawn = rng.normal(size=(num, 3))
        case "logit_gradient":
            drawn = rng.dirichlet(np.ones(NUM_CLASSES), size=num) - np.eye(NUM_CLASSES)[labels_of(num)]
        case "correct":
            drawn = rng.random(num) < 0.6
        case "confidence" | "prob_label" | "top_gap":
            drawn = rng.random(num)
        case "margin":
            drawn = rng.uniform(-1, 1, num)
        case "boundary_label" | "logit_margin":
            drawn = rng.normal(size=num)
        case _:
            drawn = rng.exponential(size=num)
    return drawn.astype(np.float32)


def fingerprint(selection: Selection) -> tuple[Any, ...]:
    """Return what must be equal in equal selections."""
    sweep = selection.sweep if isinstance(selection.sweep, str | None) else selection.sweep.tobytes()
    numbers = (selection.requested, selection.expected_drops, selection.lr_scale, selection.batch_mean_weights, sweep)
    arrays = (selection.ids, selection.weights, selection.forward_only_ids)
    return numbers + tuple((array.dtype.str, array.tobytes()) for array in arrays)


def through_a_file(selector: Selector) -> dict[str, NDArray[Any]]:
    """Return a selector's state, written as a checkpoint writes it and read again."""
    file = io.BytesIO()
    np.savez(file, **selector.state_dict())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def _same(left: list[Selection], right: list[Selection], failure: str) -> None:
    for epoch, (one, other) in enumerate(zip(left, right, strict=True)):
        _require(fingerprint(one) == fingerprint(other), failure.format(epoch=epoch))


def _table_bytes(table: ScoreTable) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in table.to_arrays().items()}


@_check("set the class attributes kind, paper and signals, and write a docstring, as examples/keep_hardest.py does")
def _attributes(method: Method, num_epochs: int) -> None:
    _require(method.kind in get_args(Kind), f"kind {method.kind!r} is not one of {', '.join(get_args(Kind))}")
    _require(method.paper, "paper is empty")
    _require(type(method).__doc__, "it has no docstring")
    of_text = isinstance(method.signals, tuple) and all(isinstance(signal, str) for signal in method.signals)
    _require(of_text and method.signals, f"signals {method.signals!r} is not a tuple of one or more names")


@_check("put @dataclass(frozen=True) above the class; hyperparameters are numbers, text, tuples, schedules and methods")
def _hyperparameters(method: Method, num_epochs: int) -> None:
    cls = type(method)
    annotated = {name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)}
    names = {field.name for field in dataclasses.fields(method)}
    _require(annotated <= names, f"{', '.join(sorted(annotated - names))} is not a field of a dataclass")
    config = method.to_config()
    _require(json.loads(json.dumps(config)) == config, f"{config} cannot be stored as YAML")
    again = cls(**{name: value for name, value in config.items() if name != "name"})
    _require(again == method and again.to_config() == config, "built again from its own config, it is another method")
    _require(hash(again) == hash(method), "equal methods have different hashes")


@_check("list signals in `signals` or `sweep_signals`, and columns of your own in columns()")
def _declarations(method: Method, num_epochs: int) -> None:
    run, ids = SyntheticRun(method, num_epochs), np.arange(NUM_SAMPLES)
    table = run.selector.table
    table.columns = _Declared(table.columns, "column")
    try:
        for epoch in range(2):
            signals = _Declared(signals_of(method.signals, ids, epoch), "signal")
            method.check(table, ids, signals, epoch)
            table.mark_visited(ids, epoch)
            method.fold(table, ids, signals, epoch)
            if method.sweep_signals:
                swept = _Declared(signals_of(method.sweep_signals, ids, epoch), "signal")
                method.fold_sweep(table, ids, swept, epoch)
        run.run()
        method.scores(table)
    except _Failure:
        raise
    except Exception:
        return  # the other checks say what is wrong


@_check(
    "return Selection.of_ids(ids, context.num_samples, weights=…) with distinct ids and finite weights above 0; a "
    "method that needs longer runs is checked with num_epochs="
)
def _selections(method: Method, num_epochs: int) -> None:
    run = SyntheticRun(method, num_epochs)
    first = run.selector.method.select(run.selector.table, run.context(0))
    _require(isinstance(first, Selection), f"select() returns {type(first).__name__}, not a Selection")
    for epoch, selection in enumerate(run.run()):
        check_selection(selection, NUM_SAMPLES, f"epoch {epoch}")


def check_selection(selection: Selection, num_samples: int, where: str) -> None:
    """Check the ids, weights and ratios of one selection; `where` starts the message of a failure."""
    ids, weights = selection.ids, selection.weights
    _require(ids.size >= 1, f"{where} keeps no sample")
    fits = ids.shape == weights.shape and ids.dtype == np.int64 and weights.dtype == np.float32
    _require(fits, f"{where} has {weights.size} weights for {ids.size} ids")
    _require(ids.min() >= 0 and ids.max() < num_samples, f"{where} has ids outside 0..{num_samples - 1}")
    _require(np.isfinite(weights).all(), f"{where} has weights that are NaN or infinite")
    # If a batch trains with the mean of its weights, the lowest weight may be 0.
    least_is_fine = (weights >= 0).all() if selection.batch_mean_weights else (weights > 0).all()
    _require(least_is_fine and weights.any(), f"{where} keeps samples with weight {weights.min():g}")
    _require(not np.intersect1d(ids, selection.forward_only_ids).size, f"{where} trains on forward_only_ids")
    _require(0 <= selection.requested < 1, f"{where} requests the prune ratio {selection.requested:g}")


@_check("fold() may write the rows of the ids that it gets, such as table[name][ids] = …, and no others")
def _rows(method: Method, num_epochs: int) -> None:
    run = SyntheticRun(method, num_epochs)
    run.visit(0)
    selection = run.selector.begin_epoch(1)
    half, table = selection.ids[::2], run.selector.table
    others = np.setdiff1d(np.arange(NUM_SAMPLES), half)
    before = {name: array[others].tobytes() for name, array in table.to_arrays().items()}
    run.observe(half, 1)
    for name, array in table.to_arrays().items():
        _require(array[others].tobytes() == before[name], f"fold() changes {name!r} of samples that it did not get")


@_check("draw from context.rng, which the seed and the epoch determine, and sort with kind='stable'")
def _determinism(method: Method, num_epochs: int) -> None:
    one, two = (SyntheticRun(method, num_epochs).run() for _ in range(2))
    _same(one, two, "two runs with the same seed and signals select other samples or weights in epoch {epoch}")
    if method.unbiased and any(selection.realised for selection in one):
        seeds = [SyntheticRun(method, num_epochs, seed=seed).run() for seed in range(4, 8)]
        first = [fingerprint(selection) for selection in one]
        drawn = any(first != [fingerprint(selection) for selection in other] for other in seeds)
        _require(drawn, "it is declared unbiased, and the seed does not change what it selects")


@_check("draw from context.rng instead")
def _global_random_state(method: Method, num_epochs: int) -> None:
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        # A state that no earlier run of the method has left behind.
        np.random.set_state(np.random.RandomState(20_240_501).get_state())  # noqa: NPY002
        seeded = pickle.dumps(np.random.get_state())  # noqa: NPY002
        SyntheticRun(method, num_epochs).run()
        _require(pickle.dumps(np.random.get_state()) == seeded, "it uses NumPy's global generator")  # noqa: NPY002
        _require(random.getstate() == before[1], "it uses the global generator of the module `random`")
    finally:
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])


@_check("select() must compute from the table and the context alone; write scores in fold()")
def _purity(method: Method, num_epochs: int) -> None:
    run = SyntheticRun(method, num_epochs)
    for epoch in range(run.num_epochs):
        run.selector.end_sweep()  # which may write columns
        table, context = run.selector.table, run.context(epoch)
        before = _table_bytes(table)
        one = run.selector.method.select(table, context)
        _require(_table_bytes(table) == before, f"select() changes the table in epoch {epoch}")
        two = run.selector.method.select(table, dataclasses.replace(context))
        _same([one], [two], f"in epoch {epoch}, select() called twice on one table returns two selections")
        run.visit(epoch)


@_check("fold() must give the same table for any division into batches: compute what needs all samples in select()")
def _order_of_observations(method: Method, num_epochs: int) -> None:
    whole, parts = (SyntheticRun(method, num_epochs) for _ in range(2))
    for epoch in range(whole.num_epochs):
        selection = parts.selector.begin_epoch(epoch)
        _same([whole.visit(epoch)], [selection], f"batches in another order change the selection of epoch {epoch}")
        ids = np.random.default_rng(epoch).permutation(selection.ids)
        for batch in np.array_split(ids, 5):
            parts.observe(batch, epoch)
        parts.sweep(selection, epoch)
    same = _table_bytes(whole.selector.table) == _table_bytes(parts.selector.table)
    _require(same, "batches in another order change the scores")


@_check(
    "fold() must need only the rows of its ids; N is table.num_samples, as the table may hold a part of the samples"
)
def _score_shards(method: Method, num_epochs: int) -> None:
    if any(isinstance(column, VectorColumn) for column in method.columns().values()):
        return  # these need a single table
    run = SyntheticRun(method, num_epochs)
    num, columns = run.selector.num_samples, table_columns(method, ())
    cuts = (range(num // 3), range(num // 3, num))
    tables = [ScoreTable(num, columns, run.num_epochs, rows) for rows in cuts]
    shards = [Observations(run.selector.method, table, ()) for table in tables]
    for epoch in range(run.num_epochs):
        selection = run.visit(epoch)
        scored = np.arange(num) if selection.scored_ids is None else selection.scored_ids
        passes = ((selection.ids, method.signals, False), (scored, method.sweep_signals or method.signals, True))
        for shard, rows in zip(shards, cuts, strict=True):
            for ids, names, is_sweep in passes:
                own = ids[(ids >= rows.start) & (ids < rows.stop)]
                shard.observe(own, signals_of(names, own, epoch), epoch, sweep=is_sweep)
    joined = [{**table.columns, "last_visit": table.last_visit} for table in tables]
    for name, array in {**run.selector.table.columns, "last_visit": run.selector.table.last_visit}.items():
        same = np.concatenate([part[name] for part in joined]).tobytes() == array.tobytes()
        _require(same, f"column {name!r} differs where the table is spread over shards")


@_check("define the class at the top level of a module, and keep no open files, locks or lambdas in its fields")
def _pickle(method: Method, num_epochs: int) -> None:
    pickle.dumps(method)
    _require(copy.deepcopy(method) == method, "its copy is another method")
    copied = SyntheticRun(method, num_epochs)
    copied.run(range(2))
    copied.selector = copy.deepcopy(copied.selector)  # reduces objects as pickle does
    whole = SyntheticRun(method, num_epochs).run()
    _same(whole[2:], copied.run(range(2, copied.num_epochs)), "copied after epoch 1, it selects other samples")


@_check("keep all state in the table's columns (columns() declares them): a checkpoint holds nothing else")
def _resuming(method: Method, num_epochs: int) -> None:
    num_epochs = SyntheticRun(method, num_epochs).num_epochs
    for epoch in (2, num_epochs - 2):
        for share in (0.0, 0.5):  # of the epoch that is observed before the run stops
            run = SyntheticRun(method, num_epochs)
            run.run(range(epoch))
            current = run.selector.begin_epoch(epoch)
            run.observe(current.ids[: int(share * current.num_kept)], epoch)
            restored = SyntheticRun(method, num_epochs)
            restored.selector.load_state_dict(through_a_file(run.selector))
            rest = range(epoch, num_epochs)
            _same(run.run(rest), restored.run(rest), f"resumed in epoch {epoch}, it selects other samples")
            same = _table_bytes(run.selector.table) == _table_bytes(restored.selector.table)
            _require(same, f"resumed in epoch {epoch}, it has other scores")


@_check("it must work with any N ≥ 1, and keep at least one sample")
def _few_samples(method: Method, num_epochs: int) -> None:
    for num_samples in (1, 2, 3):
        for seed in range(5):
            for selection in SyntheticRun(method, num_epochs, num_samples, seed=seed).run():
                check_selection(selection, num_samples, f"with {num_samples} samples, an epoch")


@_check("set needs_labels = True, or do without context.labels where it is None")
def _labels(method: Method, num_epochs: int) -> None:
    if not method.needs_labels and method.class_floor == 0:
        SyntheticRun(method, num_epochs, labels=False).run()


@_check("thin at random with context.thin(), which keeps the floor, and leave the rest to the Selector")
def _class_floor(method: Method, num_epochs: int) -> None:
    if method.step()[0] == "in_batch":
        return  # it refuses a floor, as a batch may lack a class
    if method.step()[0] == "in_batch":
        return  # it refuses a floor, as a batch may lack a class
    for floor in (0.3, 0.9, 1.0):
        floored = dataclasses.replace(method, class_floor=floor)
        least_C = np.ceil(np.bincount(labels_of(NUM_SAMPLES)) * floor - 1e-9)
        for seed in range(3):
            for epoch, selection in enumerate(SyntheticRun(floored, num_epochs, seed=seed).run()):
                check_selection(selection, NUM_SAMPLES, f"with class_floor {floor}, epoch {epoch}")
                kept_C = np.bincount(labels_of(NUM_SAMPLES)[selection.ids], minlength=NUM_CLASSES)
                _require((kept_C >= least_C).all(), f"class_floor {floor} does not hold in epoch {epoch}")


@_check(
    "give Selection requested=, the prune ratio of the epoch (0 if it may not prune), and expected_drops=, the number "
    "of samples to drop"
)
def _number_of_kept_samples(method: Method, num_epochs: int) -> None:
    num, method = 1000, dataclasses.replace(method, class_floor=0.0)
    tolerance = 1 + 5 * np.sqrt(num / 4)  # five standard deviations of independent draws with probability 1/2
    selections = SyntheticRun(method, num_epochs, num).run()
    for epoch, selection in enumerate(selections):
        dropped, ratio, expected = num - selection.num_kept, selection.requested, selection.expected_drops
        drops = f"epoch {epoch} drops {dropped} of {num} samples"
        _require(dropped <= (ratio * num + tolerance if ratio else 0), f"{drops} and requests the ratio {ratio:g}")
        _require(dropped or ratio < 0.05, f"{drops} and requests the ratio {ratio:g}")
        _require(abs(dropped - expected) <= tolerance, f"{drops} and expected to drop {expected:g}")
    schedule = getattr(method, "prune_ratio", None)
    if isinstance(schedule, Schedule) and any(schedule(epoch, num_epochs) for epoch in range(num_epochs)):
        pruned = any(selection.requested for selection in selections)
        _require(pruned, f"it has a prune_ratio and prunes in none of {len(selections)} epochs")


@_check("a method with collect_epochs keeps all samples for so many epochs, and then one subset; set fixed = True")
def _one_subset(method: Method, num_epochs: int) -> None:
    if method.collect_epochs:
        selections = SyntheticRun(dataclasses.replace(method, class_floor=0.0), num_epochs).run()
        scoring, subsets = selections[: method.collect_epochs], selections[method.collect_epochs :]
        _require(all(not selection.realised for selection in scoring), "it prunes while it collects scores")
        _require(len({selection.ids.tobytes() for selection in subsets}) == 1, "it changes its subset")
        _require(method.fixed, "fixed is False")


@_check("scores() returns one number per sample, (N,), for each name")
def _scores(method: Method, num_epochs: int) -> None:
    run = SyntheticRun(method, num_epochs)
    run.run()
    scores = method.scores(run.selector.table)
    _require(scores, "scores() is empty")
    for name, column in scores.items():
        of_numbers = isinstance(column, np.ndarray) and column.dtype.kind in "biuf"
        _require(of_numbers, f"score {name!r} is not an array of numbers")
        _require(column.shape == (NUM_SAMPLES,), f"score {name!r} has shape {column.shape}")


@_check("give each sample that is drawn with probability k the weight 1/k, as context.thin() does, or unbiased = False")
def _unbiasedness(method: Method, num_epochs: int) -> None:
    if method.unbiased:
        for floor in sorted({method.class_floor, 0.0, 0.5}):
            _check_means(dataclasses.replace(method, class_floor=floor), num_epochs)


def _check_means(method: Method, num_epochs: int) -> None:
    """Compare the mean of Σ w·v over 300 draws with Σ v, for three vectors v."""
    num, num_draws = 20, 300
    ids = np.arange(num)
    signals = signals_of(method.signals, ids, 0)
    values_VN = np.stack([np.ones(num), np.arange(num) ** 2.0, signals[method.signals[0]].reshape(num, -1)[:, 0]])
    sums = []
    for seed in range(num_draws):
        selector = Selector(method, num, num_epochs, seed, labels=np.arange(num) // 7)
        selector.observe(ids, signals, 0)
        selection = selector.begin_epoch(1)
        sums.append(values_VN[:, selection.ids] @ selection.weights.astype(np.float64))
    mean_V, error_V = np.mean(sums, axis=0), np.std(sums, axis=0) / np.sqrt(num_draws)
    # 1e-6 for weights that are float32.
    close = np.abs(mean_V - values_VN.sum(axis=1)) <= 4.5 * error_V + 1e-6 * values_VN.sum(axis=1)
    ratio = mean_V[0] / num
    _require(close.all(), f"it is declared unbiased, and its weights sum to {ratio:.3f}·N over {num_draws} draws")


class SyntheticBatches:
    """An in-batch method on batches of a run with random signals.

    Args:
        method: the method; its columns from files are random, too.
        seed: of the run.
    """

    def __init__(self, method: InBatchMethod, seed: int = 3) -> None:
        self.method, self._seed = method, seed
        drawn = signals_of(method.file_columns(), np.arange(NUM_SAMPLES), 0)
        states = method.state_columns(NUM_SAMPLES)
        self.columns = {name: np.full(NUM_SAMPLES, value, dtype=np.float32) for name, value in states.items()} | drawn
        run = SyntheticRun(method, seed=seed)
        run.run(range(2))
        self._facts = run.selector.begin_epoch(2).facts

    def context(self, ids: NDArray[np.int64], step: int) -> BatchContext:
        """Return the context of a batch of step `step` of 10 in epoch 2 of 4."""
        context = StepContext(
            epoch=2, num_epochs=4, step=step, num_steps=10, num_samples=NUM_SAMPLES, seed=self._seed, facts=self._facts
        )
        columns = {name: column[ids] for name, column in self.columns.items()}
        return context.with_rows(ids, labels_of(NUM_SAMPLES)[ids], columns)

    def signals(self, ids: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """Return the signals of a batch."""
        return signals_of(self.method.batch_signals, ids, 2)

    def pick(
        self, ids: NDArray[np.int64], step: int = 0, signals: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[int, float]:
        """Return the picked ids with their weights."""
        signals = self.signals(ids) if signals is None else signals
        rows, weights = Candidates(signals, self.context(ids, step)).pick(self.method)
        return dict(zip(ids[rows].tolist(), weights.tolist(), strict=True))


_BATCHES = (1, 2, 7, NUM_SAMPLES)


@_check(
    "pick() returns distinct rows in 0..B-1, as many as `keep` says, for any B ≥ 1 and any finite signals, and weights "
    "or None; it draws from context.rng and changes nothing that it gets"
)
def _picks(method: Method, num_epochs: int) -> None:
    if not isinstance(method, InBatchMethod):
        return
    batches = SyntheticBatches(method)
    before = pickle.dumps(np.random.get_state()), random.getstate()  # noqa: NPY002
    for size in _BATCHES:
        ids = np.random.default_rng(size).permutation(NUM_SAMPLES)[:size]
        drawn = batches.signals(ids)
        cases = {
            "random": drawn,
            "equal": {name: np.ones_like(array) for name, array in drawn.items()},
            "zero": {name: np.zeros_like(array) for name, array in drawn.items()},
            "huge": {name: array * np.float32(1e30) for name, array in drawn.items()},
        }
        for (kind, signals), step in product(cases.items(), range(3)):
            _require(isinstance(method.picks(batches.context(ids, step)), bool), "picks() returns no bool")
            picked, where = batches.pick(ids, step, signals), f"of {size} rows with {kind} signals"
            _require(picked == batches.pick(ids, step, signals), f"{where}, it picks others when asked again")
            keep = getattr(method, "keep", None)
            if isinstance(keep, float):
                count = num_picked(keep, size)
                _require(len(picked) == count, f"{where}, it picks {len(picked)}, and keep {keep:g} means {count}")
    _require(pickle.dumps(np.random.get_state()) == before[0], "it uses NumPy's global generator")  # noqa: NPY002
    _require(random.getstate() == before[1], "it uses the global generator of the module `random`")


@_check("update() returns a finite number per candidate, (B,), for each name in state_columns(), and for no other")
def _state_columns(method: Method, num_epochs: int) -> None:
    if isinstance(method, InBatchMethod):
        batches, ids = SyntheticBatches(method), np.arange(0, NUM_SAMPLES, 2)
        states = sorted(method.state_columns(NUM_SAMPLES))
        for step in range(3):
            updated = Candidates(batches.signals(ids), batches.context(ids, step)).update(method)
            _require(sorted(updated) == states, f"update() returns {sorted(updated)}, not {states}")
            for name, values in updated.items():
                fits = np.shape(values) == ids.shape and np.isfinite(values).all()
                _require(fits, f"update() returns {name!r} of shape {np.shape(values)}, or with NaN")
                batches.columns[name][ids] = values
