"""Table + method + seed = the next epoch's selection; the in-process twin of the ScoreActor.

Shapes: N samples, B observed. A selection is a pure function of (table at the epoch's start, epoch, seed), so a run
that is restored to an epoch's start selects the same samples again.

What the core asks of a selection method.

Where the run stands when a method selects, and the draws that it may make.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.selection import Selection, as_ids, checked_labels, kept_shares, top_up
from rayprune.core.table import ScoreTable, chunks, fold_means, mean_columns, mean_scores
from rayprune.core.thinning import thin, thin_with_class_floor
from rayprune.core.validation import shown
from rayprune.errors import ConfigError


class EpochContext:
    """Tell a method where the run stands when it selects.

    Attributes:
        epoch, num_epochs: 0-based epoch e of E.
        num_samples: N.
        labels: (N,) class of each sample, or None.
        visits_before: samples kept in all earlier epochs together.
        chosen: the selection of a file that the method names, or None.
    """

    def __init__(
        self,
        epoch: int,
        num_epochs: int,
        num_samples: int,
        seed: int,
        labels: NDArray[Any] | None = None,
        class_floor: float = 0.0,
        visits_before: int = 0,
        chosen: Selection | None = None,
    ) -> None:
        self.epoch, self.num_epochs, self.num_samples = epoch, num_epochs, num_samples
        self.labels, self.visits_before, self.chosen = labels, visits_before, chosen
        self._seed, self._class_floor = seed, class_floor

    @cached_property
    def rng(self) -> np.random.Generator:
        """The epoch's generator, `default_rng([seed, epoch])`; every draw of the selection comes from it."""
        return self.rng_of(self.epoch)

    def rng_of(self, epoch: int) -> np.random.Generator:
        """Return a fresh generator of another epoch, for a choice that must come out the same in several epochs."""
        return np.random.default_rng([self._seed, epoch])

    def derived_rng(self, purpose: int, epoch: int | None = None) -> np.random.Generator:
        """Return a generator for one purpose (an integer from 2), independent of `rng` and of the plan's."""
        return np.random.default_rng([self._seed, self.epoch if epoch is None else epoch, purpose])

    def thin(self, strata: NDArray[np.unsignedinteger[Any]], keep_ratios: ArrayLike) -> Selection:
        """Thin strata at random without bias, above the class floor where one is set.

        Args:
            strata: (N,) unsigned integers; 0 = kept whole, s ≥ 1 = thinned to `keep_ratios[s - 1]`.
            keep_ratios: (S,) in (0, 1].
        """
        ratios = np.asarray(keep_ratios, dtype=np.float64)
        if self._class_floor > 0 and self.labels is not None:
            return thin_with_class_floor(strata, ratios, self.labels, self._class_floor, self.rng)
        return thin(strata, ratios, self.rng)


@runtime_checkable
class SelectionMethod(Protocol):
    """What the Selector needs of a method; `rayprune.methods.base.Method` is its implementation."""

    @property
    def class_floor(self) -> float: ...

    @property
    def signals(self) -> tuple[str, ...]: ...

    @property
    def sweep_signals(self) -> tuple[str, ...]: ...

    @property
    def fixed(self) -> bool: ...

    @property
    def needs_labels(self) -> bool: ...

    def to_config(self) -> dict[str, Any]: ...

    def columns(self) -> Mapping[str, Any]: ...

    def check(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> NDArray[np.bool_] | None: ...

    def fold(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> None: ...

    def fold_sweep(
        self, table: ScoreTable, ids: NDArray[np.int64], signals: Mapping[str, NDArray[Any]], epoch: int
    ) -> None: ...

    def select(self, table: ScoreTable, context: EpochContext) -> Selection: ...

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]: ...


logger = logging.getLogger(__name__)

STATE_SCHEMA = 1
_NAMED_NONFINITE = 20


class Selector:
    """Fold observations into a score table and choose each epoch's samples.

    Args:
        method: a rayprune method, such as `InfoBatch()`.
        num_samples: N, at least 1.
        num_epochs: E, at least 1.
        seed: non-negative integer; with the table and the epoch it fixes every selection.
        labels: (N,) integers from 0, needed by `class_floor` and by methods that balance classes.
        chosen: the selection that a method with a file (`Fixed`) trains on.
        record: signals whose mean over the visits, `NAME_mean`, stands among the scores beside the method's own.
        visits_collected: samples trained by a run that scored them before, for the budget that is told.

    Raises:
        ConfigError: no method, a number out of range, labels that do not fit, or a class floor without labels.

    >>> from rayprune.methods import InfoBatch
    >>> selector = Selector(InfoBatch(prune_ratio=0.5), num_samples=4, num_epochs=8, seed=0)
    >>> selector.begin_epoch(0).ids.tolist()
    [0, 1, 2, 3]
    >>> selector.observe([0, 1, 2, 3], {"loss": [0.1, 2.0, 3.0, 2.0]}, epoch=0)
    >>> set(selector.begin_epoch(1).ids.tolist()) >= {1, 2, 3}
    True
    """

    def __init__(
        self,
        method: SelectionMethod,
        num_samples: int,
        num_epochs: int,
        seed: int = 0,
        labels: ArrayLike | None = None,
        chosen: Selection | None = None,
        record: tuple[str, ...] = (),
        visits_collected: int = 0,
    ) -> None:
        if isinstance(method, type) or not isinstance(method, SelectionMethod):
            raise ConfigError(f"method must be a rayprune method such as InfoBatch(), got {shown(method)}")
        for name, value, least in (("num_samples", num_samples, 1), ("num_epochs", num_epochs, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name} {value!r} must be an integer of at least {least}")
        self.method, self.num_samples, self.num_epochs, self.seed = method, int(num_samples), int(num_epochs), int(seed)
        self.labels = None if labels is None else checked_labels(labels, self.num_samples)
        if method.class_floor > 0 and self.labels is None:
            raise ConfigError(f"class_floor {method.class_floor} needs labels: give labels= to the Selector")
        if method.needs_labels and self.labels is None:
            raise ConfigError(
                f"{method.to_config()['name']} balances classes and needs labels: give labels=, or "
                "choose a balance that needs none"
            )
        if chosen is not None and chosen.num_samples != self.num_samples:
            raise ConfigError(f"the chosen selection is over {chosen.num_samples} samples, here {self.num_samples}")
        self.chosen, self.record, self.visits_collected = chosen, tuple(record), visits_collected
        columns = {**method.columns(), **mean_columns(self.record)}
        self.table = ScoreTable(self.num_samples, columns, self.num_epochs)
        self.epoch = -1
        self.visits_before = 0
        self.num_nonfinite = 0
        self.nonfinite_ids: list[int] = []
        self._selection = Selection.full(self.num_samples)

    def begin_epoch(self, epoch: int) -> Selection:
        """Choose the samples of `epoch`; asked again for the same epoch, return the same Selection.

        Epochs may be skipped; they count as not trained, so that all their visits count as saved.

        Raises:
            ConfigError: the epoch lies before one already begun, or outside [0, num_epochs).
            RuntimeError: the method meant to drop at least one sample and dropped none, or kept none at all.
        """
        epoch = self._checked_epoch(epoch)
        if epoch == self.epoch:
            return self._selection
        if epoch < self.epoch:
            raise ConfigError(f"epoch {epoch} is over: epoch {self.epoch} has begun")
        visits_before = self.visits_before + (self._selection.num_kept if self.epoch >= 0 else 0)
        selection = self._select(epoch, visits_before)
        self.epoch, self.visits_before, self._selection = epoch, visits_before, selection
        for rows in chunks(self.num_samples):
            self.table.times_pruned[rows] += selection.codes[rows] == 0
        return selection

    def _checked_epoch(self, epoch: int) -> int:
        if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch < self.num_epochs:
            raise ConfigError(f"epoch {epoch!r} is no integer in [0, {self.num_epochs})")
        return int(epoch)

    def _select(self, epoch: int, visits_before: int) -> Selection:
        floor, run = self.method.class_floor, (self.num_epochs, self.num_samples, self.seed)
        context = EpochContext(epoch, *run, self.labels, floor, visits_before, self.chosen)
        selection = self.method.select(self.table, context)
        if selection.num_samples != self.num_samples:
            raise RuntimeError(f"the selection is over {selection.num_samples} samples, not {self.num_samples}")
        if selection.expected_drops >= 1 and selection.num_kept == self.num_samples:
            raise RuntimeError(
                f"epoch {epoch}: {selection.expected_drops:.0f} samples were to be dropped at prune ratio "
                f"{selection.requested:g}, and none was"
            )
        if selection.num_kept == 0:
            raise RuntimeError(f"epoch {epoch}: nothing is kept at prune ratio {selection.requested:g}: lower it")
        if floor > 0:
            assert self.labels is not None
            draw = np.random.default_rng([self.seed, 0 if self.method.fixed else epoch, 1])
            selection = top_up(selection, self.labels, floor, draw)
        visits = self.visits_collected + visits_before + selection.num_kept
        facts: dict[str, Any] = {"budget_so_far": round(visits / (self.num_samples * self.num_epochs), 6)}
        if self.labels is not None:
            facts["class_kept"] = kept_shares(selection, self.labels)
        return selection.with_facts(**facts)

    def observe(self, ids: ArrayLike, signals: Mapping[str, ArrayLike], epoch: int, *, sweep: bool = False) -> None:
        """Fold what the workers saw at their visits into the table.

        Rows with a NaN or infinite signal never enter the table: they are logged, counted in `num_nonfinite` and the
        first of their ids kept in `nonfinite_ids`.

        Args:
            ids: (B,) distinct integers in [0, N).
            signals: name → (B,) or (B, …) numbers; every signal that the method declares.
            epoch: the epoch of the visits, not before the one begun last.
            sweep: the visits were a forward-only pass: `signals` are the method's `sweep_signals`, where it has such.

        Raises:
            ConfigError: ids repeat, are unknown or not integers; a signal is missing or has another length; the epoch
                has passed; or the method's own `check` refuses them. The table is left as it was.
        """
        checked = as_ids(ids, self.num_samples)
        epoch = self._checked_epoch(epoch)
        if epoch < self.epoch:
            raise ConfigError(f"observation of epoch {epoch}, but epoch {self.epoch} of {self.num_epochs} is running")
        arrays: dict[str, NDArray[Any]] = {}
        swept = sweep and bool(self.method.sweep_signals)
        names = self.method.sweep_signals if swept else tuple(dict.fromkeys((*self.method.signals, *self.record)))
        for name in names:
            if name not in signals:
                raise ConfigError(f"signal {name!r} is missing: the method needs {list(names)}")
            array = np.asarray(signals[name])
            if array.shape[:1] != checked.shape:
                raise ConfigError(f"signal {name!r} of shape {array.shape} does not fit {checked.size} ids")
            if array.dtype.kind not in "biuf":
                raise ConfigError(f"signal {name!r} must hold numbers, got {array.dtype}")
            column = self.table.columns.get(name)
            if column is not None and column.ndim == 1 and array.ndim != 1:
                raise ConfigError(f"signal {name!r} of shape {array.shape} must be one number a sample")
            arrays[name] = array
        checked, arrays = self._finite(checked, arrays, epoch)
        if checked.size:
            self._fold(checked, arrays, epoch, swept)

    def _fold(self, ids: NDArray[np.int64], signals: dict[str, NDArray[Any]], epoch: int, swept: bool) -> None:
        wanted = None if swept else self.method.check(self.table, ids, signals, epoch)
        fresh = self.table.last_visit[ids] != epoch  # for the means: a visit that is told twice counts once
        self.table.mark_visited(ids, epoch)
        fold = self.method.fold_sweep if swept else self.method.fold
        if wanted is None or wanted.all():
            fold(self.table, ids, signals, epoch)
        elif wanted.any():
            fold(self.table, ids[wanted], {name: array[wanted] for name, array in signals.items()}, epoch)
        if self.record and not swept:
            fold_means(self.table, ids[fresh], {name: signals[name][fresh] for name in self.record}, self.record)

    def _finite(
        self, ids: NDArray[np.int64], arrays: dict[str, NDArray[Any]], epoch: int
    ) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
        finite = np.ones(ids.size, dtype=bool)
        for array in arrays.values():
            with np.errstate(over="ignore"):  # columns are float32: what overflows there is infinite too
                rows = np.isfinite(array.astype(np.float32, copy=False))
            finite &= rows.all(axis=tuple(range(1, rows.ndim)))
        if finite.all():
            return ids, arrays
        bad = ids[~finite]
        self.num_nonfinite += int(bad.size)
        self.nonfinite_ids += bad[: max(0, _NAMED_NONFINITE - len(self.nonfinite_ids))].tolist()
        logger.warning("epoch %d: %d NaN or infinite signals left out, ids %s", epoch, bad.size, bad[:5].tolist())
        return ids[finite], {name: array[finite] for name, array in arrays.items()}

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores, name → (N,) copy; NaN where a sample was never visited."""
        found = {**self.method.scores(self.table), **mean_scores(self.table, self.record)}
        return {name: np.array(column) for name, column in found.items()}

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the whole state as arrays by name (none needs pickle), not copied: table and current Selection."""
        state = {"header": np.frombuffer(json.dumps(self._header()).encode(), dtype=np.uint8)}
        state |= {f"table/{name}": array for name, array in self.table.to_arrays().items()}
        return state | {f"selection/{name}": array for name, array in self._selection.to_arrays().items()}

    def _header(self) -> dict[str, Any]:
        return {
            "schema": STATE_SCHEMA,
            "method": self.method.to_config(),
            "num_samples": self.num_samples,
            "num_epochs": self.num_epochs,
            "seed": self.seed,
            "epoch": self.epoch,
            "visits_before": self.visits_before,
            "num_nonfinite": self.num_nonfinite,
            "nonfinite_ids": self.nonfinite_ids,
        }

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go back to a state of `state_dict`, the current Selection included.

        Raises:
            ConfigError: the state is incomplete, of a newer schema, another method, number of samples or epochs, or
                seed; nothing was overwritten.
        """
        header, own = _read_header(state), self._header()
        if header.get("schema", STATE_SCHEMA) > STATE_SCHEMA:
            raise ConfigError(f"state of schema {header['schema']}, this version reads up to {STATE_SCHEMA}: upgrade")
        if missing := own.keys() - header.keys():
            raise ConfigError(f"the state's header lacks {', '.join(sorted(missing))}: give back a whole state_dict()")
        for name in ("method", "num_samples", "num_epochs", "seed"):
            if header[name] != json.loads(json.dumps(own[name])):
                raise ConfigError(f"the state is of another run: {name} {header[name]!r}, here {own[name]!r}")
        packed = {k.removeprefix("selection/"): v for k, v in state.items() if k.startswith("selection/")}
        selection = Selection.from_arrays(packed)
        if selection.num_samples != self.num_samples:
            raise ConfigError(f"the stored selection is over {selection.num_samples} samples, here {self.num_samples}")
        self.table.load_arrays({k.removeprefix("table/"): v for k, v in state.items() if k.startswith("table/")})
        self._selection = selection
        self.epoch, self.visits_before = header["epoch"], header["visits_before"]
        self.num_nonfinite, self.nonfinite_ids = header["num_nonfinite"], list(header["nonfinite_ids"])


def _read_header(state: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    try:
        return dict(json.loads(bytes(state["header"]).decode()))
    except (KeyError, ValueError, TypeError):
        raise ConfigError("the state has no readable header: give back what state_dict() returned") from None
