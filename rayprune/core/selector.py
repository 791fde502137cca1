"""The Selector: table + method + seed → the next epoch's selection; the in-process twin of the ScoreActor.

A selection is a pure function of (table at the epoch's start, epoch, seed), so a run that is restored to an epoch's
start selects the same samples again.

Shapes: N samples, B observed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.method import EpochContext, Method
from rayprune.core.redaction import redacted_tree
from rayprune.core.selection import Selection, check_ids, check_labels, kept_shares, top_up
from rayprune.core.table import Ids, ScoreTable, Signals, chunks, fold_means, mean_columns
from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError, RunFolderError

logger = logging.getLogger(__name__)

STATE_SCHEMA = 1
_RUN_FIELDS = ("num_samples", "num_epochs", "seed")
_STATE_FIELDS = (*_RUN_FIELDS, "epoch", "visits_before", "num_nonfinite", "nonfinite_ids")
MAX_NONFINITE_IDS = 20


def table_columns(method: Method, record: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns of a ScoreTable: the method's, and those for the means of recorded signals."""
    return {**method.columns(), **mean_columns(record)}


class Observations:
    """Folds observations into the rows of a score table.

    Args:
        method: how to fold them.
        table: the table, of all samples or a part of them.
        record: signals whose mean over the visits is kept, too.

    Attributes:
        num_nonfinite, nonfinite_ids: the number of NaN and infinite signals left out, and the first samples with one.
    """

    def __init__(self, method: Method, table: ScoreTable, record: tuple[str, ...]) -> None:
        self.method, self.table, self.record = method, table, record
        self.num_nonfinite = 0
        self.nonfinite_ids: list[int] = []

    def observe(self, ids: Ids, signals: Mapping[str, ArrayLike], epoch: int, *, sweep: bool = False) -> None:
        """Fold the signals of (B,) ids of the table, as `Selector.observe` does.

        Raises:
            ConfigError: ids repeat, a signal is missing or has another shape, or the method's `check` refuses them.
        """
        sweep = sweep and bool(self.method.sweep_signals)
        names = self.method.sweep_signals if sweep else tuple(dict.fromkeys((*self.method.signals, *self.record)))
        arrays: dict[str, NDArray[Any]] = {}
        for name in names:
            if name not in signals:
                raise ConfigError(f"signal {name!r} is missing: the method needs {list(names)}")
            arrays[name] = self._check_signal(name, np.asarray(signals[name]), ids.size, sweep)
        ids, arrays = self._drop_nonfinite(ids, arrays, epoch)
        if ids.size:
            self._fold(ids - self.table.rows.start, arrays, epoch, sweep)

    def _check_signal(self, name: str, array: NDArray[Any], num_ids: int, sweep: bool) -> NDArray[Any]:
        if array.shape[:1] != (num_ids,):
            raise ConfigError(
                f"signal {name!r} of shape {array.shape} does not fit {num_ids} ids: give one row for each id"
            )
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"signal {name!r} must hold numbers, got {array.dtype}")
        column = self.table.columns.get(name)
        if array.ndim != 1 and column is not None and column.ndim == 1:
            raise ConfigError(f"signal {name!r} of shape {array.shape} must be one number per sample")
        if array.ndim != 1 and name in self.record and not sweep:
            raise ConfigError(f"signal {name!r} of shape {array.shape}: train.record takes one number per sample")
        return array

    def _drop_nonfinite(
        self, ids: Ids, arrays: dict[str, NDArray[Any]], epoch: int
    ) -> tuple[Ids, dict[str, NDArray[Any]]]:
        finite = np.ones(ids.size, dtype=bool)
        for array in arrays.values():
            with np.errstate(over="ignore"):  # columns are float32: numbers that overflow there count as infinite
                rows = np.isfinite(array.astype(np.float32, copy=False))
            finite &= rows.all(axis=tuple(range(1, rows.ndim)))
        if finite.all():
            return ids, arrays
        bad = ids[~finite]
        self.num_nonfinite += int(bad.size)
        self.nonfinite_ids += bad[: max(0, MAX_NONFINITE_IDS - len(self.nonfinite_ids))].tolist()
        logger.warning("epoch %d: %d NaN or infinite signals left out, ids %s", epoch, bad.size, bad[:5].tolist())
        return ids[finite], {name: array[finite] for name, array in arrays.items()}

    def _fold(self, ids: Ids, signals: Signals, epoch: int, sweep: bool) -> None:
        mask = None if sweep else self.method.check(self.table, ids, signals, epoch)
        first = self.table.last_visit[ids] != epoch  # for the means: a visit that is observed twice counts once
        self.table.mark_visited(ids, epoch)
        fold = self.method.fold_sweep if sweep else self.method.fold
        if mask is None or mask.all():
            fold(self.table, ids, signals, epoch)
        elif mask.any():
            fold(self.table, ids[mask], {name: array[mask] for name, array in signals.items()}, epoch)
        if self.record and not sweep:
            fold_means(self.table, ids[first], {name: signals[name][first] for name in self.record})


class Selector:
    """Fold observations into a score table and choose each epoch's samples.

    Args:
        method: a rayprune method, such as `InfoBatch()`.
        num_samples: N, at least 1.
        num_epochs: E, at least 1.
        seed: non-negative integer; with the table and the epoch it determines every selection.
        labels: (N,) integers from 0, needed by `class_floor` and by methods that balance classes.
        chosen: the selection of a method that reads one from a file (`Fixed`).
        record: signals whose mean over the visits, `NAME_mean`, is added to the method's scores.
        visits_collected: samples trained by an earlier run that scored them; they count in `budget_so_far`.
        recalls: (C,) recall of each class on validation data in that run, for the balance `drop`.
        averaged: name → (N,) scores averaged over several such runs, which replace the table's.
        table: where the scores are, if not in a table of this Selector's own.

    Raises:
        ConfigError: `method` is not a method, a number is out of range, labels do not fit, or labels are needed.

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
        method: Method,
        num_samples: int,
        num_epochs: int,
        seed: int = 0,
        labels: ArrayLike | None = None,
        *,
        chosen: Selection | None = None,
        record: tuple[str, ...] = (),
        visits_collected: int = 0,
        recalls: NDArray[np.float64] | None = None,
        averaged: Mapping[str, NDArray[Any]] | None = None,
        table: ScoreTable | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise ConfigError(
                f"method must be a rayprune method such as InfoBatch(), got {short_repr(method)}: give an instance, or "
                "build_method(name)"
            )
        for name, value, least in (("num_samples", num_samples, 1), ("num_epochs", num_epochs, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ConfigError(f"{name} {short_repr(value)} must be an integer of at least {least}")
        self.method, self.num_samples, self.num_epochs, self.seed = method, int(num_samples), int(num_epochs), int(seed)
        self.labels = None if labels is None else check_labels(labels, self.num_samples)
        if method.class_floor > 0 and self.labels is None:
            raise ConfigError(f"class_floor {method.class_floor} needs labels: give labels= to the Selector")
        if method.needs_labels and self.labels is None:
            raise ConfigError(
                f"{method.to_config()['name']} balances classes and needs labels: give labels=, or "
                "choose a balance that needs none"
            )
        if chosen is not None and chosen.num_samples != self.num_samples:
            raise ConfigError(
                f"the chosen selection is over {chosen.num_samples} samples, not {self.num_samples}: choose again"
            )
        self.chosen, self.record, self.visits_collected = chosen, tuple(record), visits_collected
        self.recalls, self.averaged = recalls, averaged or {}
        if table is None:
            table = ScoreTable(self.num_samples, table_columns(method, self.record), self.num_epochs)
        self.table, self.observations = table, Observations(method, table, self.record)
        self.epoch = -1
        self.visits_before = 0
        self._selection = Selection.full(self.num_samples)

    @property
    def num_nonfinite(self) -> int:
        """How many NaN and infinite signals were left out."""
        return self.observations.num_nonfinite

    @property
    def nonfinite_ids(self) -> list[int]:
        """The first samples that had one."""
        return self.observations.nonfinite_ids

    def begin_epoch(self, epoch: int) -> Selection:
        """Choose the samples of `epoch`; a second call for the same epoch returns the same Selection.

        Epochs may be skipped; they count as not trained, so all their visits count as saved.

        Raises:
            ConfigError: a later epoch has begun, or the epoch is outside [0, num_epochs).
            RuntimeError: the method meant to drop at least one sample and dropped none, or kept none at all.
        """
        epoch = self._check_epoch(epoch)
        if epoch == self.epoch:
            return self._selection
        if epoch < self.epoch:
            raise ConfigError(f"epoch {epoch} is over: begin epoch {self.epoch} or a later one")
        self.end_sweep()
        visits_before = self.visits_before + (self._selection.num_kept if self.epoch >= 0 else 0)
        selection = self._select(epoch, visits_before)
        self.epoch, self.visits_before, self._selection = epoch, visits_before, selection
        for rows in chunks(self.num_samples):
            self.table.times_pruned[rows] += selection.codes[rows] == 0
        return selection

    def _check_epoch(self, epoch: int) -> int:
        if isinstance(epoch, bool) or not isinstance(epoch, int | np.integer) or not 0 <= epoch < self.num_epochs:
            raise ConfigError(f"epoch {short_repr(epoch)} is not an integer in [0, {self.num_epochs})")
        return int(epoch)

    def end_sweep(self) -> None:
        """Let the method condense the vectors of the current epoch's forward-only pass, if there are any.

        `begin_epoch` of the next epoch does it, too.

        Raises:
            ConfigError: a sample has no vector.
        """
        if any(not vectors.is_empty for vectors in self.table.vectors.values()):
            self.method.condense(self.table, self._context(self.epoch, self.visits_before))
            for vectors in self.table.vectors.values():
                vectors.clear()

    def _context(self, epoch: int, visits_before: int) -> EpochContext:
        run = (epoch, self.num_epochs, self.num_samples, self.seed, self.labels)
        return EpochContext(
            *run, self.method.class_floor, visits_before, self.chosen, recalls=self.recalls, averaged=self.averaged
        )

    def _select(self, epoch: int, visits_before: int) -> Selection:
        floor, context = self.method.class_floor, self._context(epoch, visits_before)
        selection = self.method.select(self.table, context)
        if selection.num_samples != self.num_samples:
            raise RuntimeError(f"the selection is over {selection.num_samples} samples, not {self.num_samples}")
        if selection.expected_drops >= 1 and selection.num_kept == self.num_samples:
            raise RuntimeError(
                f"epoch {epoch}: the method meant to drop {selection.expected_drops:.0f} samples at prune ratio "
                f"{selection.requested:g} and dropped none"
            )
        if selection.num_kept == 0 and not selection.num_scored:
            raise RuntimeError(f"epoch {epoch}: no sample is kept at prune ratio {selection.requested:g}: lower it")
        if floor > 0:
            assert self.labels is not None
            rng = np.random.default_rng([self.seed, 0 if self.method.fixed else epoch, 1])
            selection = top_up(selection, self.labels, floor, rng)
        visits = self.visits_collected + visits_before + selection.num_kept
        facts: dict[str, Any] = {"budget_so_far": round(visits / (self.num_samples * self.num_epochs), 6)}
        if self.labels is not None:
            facts["class_kept"] = kept_shares(selection, self.labels)
        return selection.with_facts(**facts)

    def observe(self, ids: ArrayLike, signals: Mapping[str, ArrayLike], epoch: int, *, sweep: bool = False) -> None:
        """Fold the workers' observations into the table.

        Rows with a NaN or infinite signal are left out: they are logged and counted in `num_nonfinite`, and the first
        of their ids are in `nonfinite_ids`.

        Args:
            ids: (B,) distinct integers in [0, N).
            signals: name → (B,) or (B, …) numbers; every signal that the method declares.
            epoch: the epoch of the visits, not before the current one.
            sweep: the visits were a forward-only pass: `signals` are the method's `sweep_signals`, if it has any.

        Raises:
            ConfigError: ids repeat, are unknown or not integers; a signal is missing or has another shape; the epoch
                is over; or the method's own `check` refuses them. The table is unchanged.
        """
        ids = check_ids(ids, self.num_samples)
        epoch = self._check_epoch(epoch)
        if epoch < self.epoch:
            raise ConfigError(f"epoch {epoch} is over: observe samples of epoch {self.epoch}, or of a later one")
        self.observations.observe(ids, signals, epoch, sweep=sweep)

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores and the recorded means, name → (N,) copy; NaN where a sample was never visited."""
        means = {name: self.table[name] for name in mean_columns(self.record)}
        scores = {name: self.averaged.get(name, column) for name, column in self.method.scores(self.table).items()}
        return {name: np.array(column) for name, column in {**scores, **means}.items()}

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the whole state as arrays by name, not copied and free of pickle: table and current Selection."""
        state = {"header": np.frombuffer(json.dumps(self._header()).encode(), dtype=np.uint8)}
        state |= {f"table/{name}": array for name, array in self.table.to_arrays().items()}
        return state | {f"selection/{name}": array for name, array in self._selection.to_arrays().items()}

    def _header(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in _STATE_FIELDS}
        return {"schema": STATE_SCHEMA, "method": redacted_tree(self.method.to_config()), **numbers}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a state of `state_dict`, including the current Selection.

        Raises:
            RunFolderError: the state is incomplete, of a newer schema, or of another method, number of samples or
                epochs, or seed; nothing was overwritten.
        """
        header, own = _read_header(state), self._header()
        if not isinstance(header.get("schema", 0), int):
            raise RunFolderError("the state's header has no schema number: give what state_dict() returned")
        if header.get("schema", 0) > STATE_SCHEMA:
            raise RunFolderError(
                f"state of schema {header['schema']}, this version reads up to {STATE_SCHEMA}: upgrade rayprune"
            )
        if missing := own.keys() - header.keys():
            raise RunFolderError(f"the state's header lacks {', '.join(sorted(missing))}: give a whole state_dict()")
        for name in _STATE_FIELDS:
            values = header[name] if isinstance(own[name], list) else [header[name]]
            if not isinstance(values, list) or not all(type(value) is int for value in values):
                raise RunFolderError(f"the state's header has {name} {short_repr(header[name])}: give a state_dict()")
        for name in ("method", *_RUN_FIELDS):
            if header[name] != json.loads(json.dumps(own[name])):
                raise RunFolderError(f"the state is of another run: {name} {header[name]!r}, here {own[name]!r}")
        selection = Selection.from_arrays(_with_prefix(state, "selection/"))
        if selection.num_samples != self.num_samples:
            raise RunFolderError(
                f"the stored selection is over {selection.num_samples} samples, not {self.num_samples}"
            )
        self.table.load_arrays(_with_prefix(state, "table/"))
        self._selection = selection
        self.epoch, self.visits_before = header["epoch"], header["visits_before"]
        self.observations.num_nonfinite = header["num_nonfinite"]
        self.observations.nonfinite_ids = list(header["nonfinite_ids"])


def _read_header(state: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    try:
        return dict(json.loads(bytes(state["header"]).decode()))
    except (KeyError, ValueError, TypeError):
        raise RunFolderError("the state has no readable header: give what state_dict() returned") from None


def _with_prefix(state: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
