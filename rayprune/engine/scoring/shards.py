"""A score table in several actors, each with a range of the samples, where one actor is too small for it.

Workers cut their pushes and send each shard its own samples. The ScoreActor keeps the barriers, the selection and the
plan; to select, it reads the columns that the method needs. So selections are those of a single actor.

Like the ScoreActor, a shard folds each push once, names lost ones, and returns to the attempt's checkpoint after a
restart. A restarted shard has another incarnation. The ScoreActor compares it with the one that the ranks met at a
barrier: if it differs, the shard has lost observations, and all ranks arrive again and repeat them. Checkpoints hold
the joined table, so a run may continue with another number of shards.
"""

from __future__ import annotations

import logging
import uuid
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.selector import MAX_NONFINITE_IDS, Observations, table_columns
from rayprune.core.table import ScoreTable, missing, quantile_values, quantiles_of
from rayprune.engine.scoring.channel import Channel, LocalChannel, start_actor
from rayprune.engine.scoring.messages import AttemptKey, Push, ReceivedPushes, pack, unpack
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.storage.checkpoint import restore_rows
from rayprune.errors import CheckpointPending, ConfigError, ObservationsLost, StaleGeneration
from rayprune.methods import build_method

logger = logging.getLogger(__name__)

Incarnations = tuple[str, ...]


class ShardRestarted(Exception):
    """A shard has lost the observations that it had when the ranks arrived."""


@dataclass(frozen=True)
class ShardFacts:
    """What the ScoreActor needs of a shard at a barrier.

    Attributes:
        incarnation: changes when the shard is restarted.
        num_nonfinite, nonfinite_ids: of the epoch.
        values: column → the values for its quantiles.
    """

    incarnation: str
    num_nonfinite: int
    nonfinite_ids: list[int]
    values: Mapping[str, NDArray[Any]]


def shard_rows(num_samples: int, num_shards: int, index: int) -> range:
    """Return the samples of a shard.

    >>> [shard_rows(10, 3, index) for index in range(3)]
    [range(0, 3), range(3, 6), range(6, 10)]
    """
    return range(index * num_samples // num_shards, (index + 1) * num_samples // num_shards)


class ScoreShard:
    """The score table of a range of the samples.

    Args:
        spec: the ScoreActor's.
        rows: the samples.
    """

    def __init__(self, spec: ScoreSpec, rows: range) -> None:
        self._spec, self._rows, self._incarnation = spec, rows, uuid.uuid4().hex
        self._generation, self._epoch = 0, -1
        self._observations: Observations | None = None
        self._pushes = ReceivedPushes()

    def _enter(self, key: AttemptKey) -> Observations:
        """Admit a call; the first one of a newer attempt restores the rows, and that of a later epoch starts it."""
        if key.generation < self._generation:
            raise StaleGeneration(f"generation {key.generation} was replaced by {self._generation}")
        if key.generation > self._generation or self._observations is None:
            self._observations, self._generation = self._rows_before(key.epoch, key.resume_step), key.generation
            self._epoch = -1
        if key.epoch < self._epoch:
            raise StaleGeneration(f"a call of epoch {key.epoch} came in epoch {self._epoch}")
        if key.epoch > self._epoch:
            self._epoch, self._pushes = key.epoch, ReceivedPushes()
            self._observations.num_nonfinite, self._observations.nonfinite_ids = 0, []
        return self._observations

    def _rows_before(self, epoch: int, step: int) -> Observations:
        spec, method = self._spec, build_method(self._spec.method)
        table = ScoreTable(len(spec.source), table_columns(method, spec.record), spec.num_epochs, self._rows)
        checkpoint = spec.checkpoint_before(epoch, step)
        if checkpoint is not None:
            restore_rows(table, checkpoint)
        return Observations(method, table, spec.record)

    def observe(self, key: AttemptKey, push: Push) -> None:
        """Fold the part of a push that has this shard's samples, once."""
        try:
            observations = self._enter(key)
        except (StaleGeneration, CheckpointPending, ObservationsLost) as error:  # the next barrier names it as missing
            logger.info("refused a push: %s", error)
            return
        try:
            self._pushes.fold(push, key.epoch, observations.observe)
        except ConfigError as error:
            raise ConfigError(f"{error} (ids count from {self._rows.start} here)") from error

    def lost(self, key: AttemptKey, rank: int, num_pushes: int) -> tuple[str, list[int]]:
        """Return the incarnation, and which of a rank's pushes have not come."""
        self._enter(key)
        return self._incarnation, self._pushes.lost(rank, num_pushes)

    def facts(self, key: AttemptKey) -> ShardFacts:
        """Return what the ScoreActor needs at a barrier."""
        own = self._enter(key)
        return ShardFacts(self._incarnation, own.num_nonfinite, own.nonfinite_ids, quantile_values(own.table))

    def fetch(self, key: AttemptKey, name: str) -> tuple[str, NDArray[Any]]:
        """Return the incarnation, and this shard's rows of an array of `ScoreTable.to_arrays`."""
        return self._incarnation, self._enter(key).table.to_arrays()[name]

    def names(self, key: AttemptKey) -> list[str]:
        """Return the names that `fetch` takes, without what the ScoreActor has itself."""
        return [name for name in self._enter(key).table.to_arrays() if name != "times_pruned"]

    def num_observed(self) -> int:
        """Return the observations folded in the current epoch."""
        return self._pushes.num_observed


@dataclass(frozen=True)
class ShardGroup:
    """The ways to all shards, in the order of their samples.

    Args:
        channels: one for each shard.
        num_samples: N.
    """

    channels: tuple[Channel, ...]
    num_samples: int

    @classmethod
    def in_process(cls, spec: ScoreSpec, num_shards: int) -> ShardGroup:
        """Return shards that are objects of this process."""
        num_samples = len(spec.source)
        shards = (ScoreShard(spec, shard_rows(num_samples, num_shards, index)) for index in range(num_shards))
        return cls(tuple(LocalChannel(shard) for shard in shards), num_samples)

    @classmethod
    def start(cls, spec: ScoreSpec, name: str, num_shards: int) -> tuple[ShardGroup, list[Any]]:
        """Start Ray actors on different machines; return them and the handles that keep them alive."""
        num_samples, started = len(spec.source), []
        for index in range(num_shards):
            rows = shard_rows(num_samples, num_shards, index)
            started.append(start_actor(ScoreShard, f"{name}-shard-{index}", spec, rows, scheduling_strategy="SPREAD"))
        return cls(tuple(channel for channel, _ in started), num_samples), [handle for _, handle in started]

    def _all(self, method: str, *args: Any) -> list[Any]:
        """Call all shards at the same time."""
        waiting = [channel.begin(method, *args) for channel in self.channels]
        return [wait() for wait in waiting]

    def observe(self, key: AttemptKey, push: Push, *, wait: bool) -> None:
        """Send each shard its part of a push, also where it is empty: a shard counts the pushes."""
        signals = unpack(push.layout, push.buffer)
        ids, waiting = signals.pop("id"), []
        for index, channel in enumerate(self.channels):
            rows = shard_rows(self.num_samples, len(self.channels), index)
            mine = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
            layout, buffer = pack(ids[mine], {name: array[mine] for name, array in signals.items()})
            part = replace(push, layout=layout, buffer=buffer)
            if wait:
                waiting.append(channel.begin("observe", key, part))
            else:
                channel.post("observe", key, part)
        for done in waiting:
            done()

    def lost(self, key: AttemptKey, rank: int, num_pushes: int) -> tuple[Incarnations, list[int]]:
        """Return the incarnations, and which of a rank's pushes at least one shard has not received."""
        answers = self._all("lost", key, rank, num_pushes)
        return tuple(one for one, _ in answers), sorted({push for _, pushes in answers for push in pushes})

    def facts(self, key: AttemptKey) -> list[ShardFacts]:
        """Return the facts of all shards."""
        return self._all("facts", key)

    def fetch(self, key: AttemptKey, name: str) -> tuple[Incarnations, NDArray[Any]]:
        """Return the incarnations, and an array of `ScoreTable.to_arrays`, joined."""
        answers = self._all("fetch", key, name)
        parts = [part for _, part in answers]
        shape = max(part.shape[1:] for part in parts)  # a shard sets the length of vectors at its first observation
        whole = [
            part if part.shape[1:] == shape else np.full((len(part), *shape), missing(part.dtype), part.dtype)
            for part in parts
        ]
        return tuple(one for one, _ in answers), np.concatenate(whole)

    def table(self, key: AttemptKey) -> dict[str, NDArray[Any]]:
        """Return the arrays that the shards have, as a Selector's state names them."""
        names: list[str] = self.channels[0].call("names", key)
        return {f"table/{name}": self.fetch(key, name)[1] for name in names}

    def num_observed(self, timeout_s: float) -> int:
        """Return the observations folded in the current epoch, those of shards that do not answer left out."""
        return sum(channel.try_call("num_observed", timeout_s) or 0 for channel in self.channels)


class ShardedTable(ScoreTable):
    """The table of all samples; its columns are fetched from the shards when they are read, and kept until `forget`.

    Args:
        spec: the ScoreActor's.
        fetch: returns an array of `to_arrays`, of all samples.

    Attributes:
        remote: names of the arrays that the shards have.
    """

    def __init__(self, spec: ScoreSpec, fetch: Callable[[str], NDArray[Any]]) -> None:
        num_samples = len(spec.source)
        super().__init__(num_samples, {}, spec.num_epochs, range(0))
        self.rows, self.times_pruned = range(num_samples), np.zeros(num_samples, self.times_pruned.dtype)
        columns = table_columns(build_method(spec.method), spec.record)
        self._fetched = _Fetched({name: partial(fetch, f"column/{name}") for name in columns})
        self._visits = _Fetched({"last_visit": partial(fetch, "last_visit")})
        self.columns = self._fetched
        self.remote = ("last_visit", *(f"column/{name}" for name in columns))

    @property
    def last_visit(self) -> NDArray[np.int32]:
        """(N,) The epoch of the sample's last visit, -1 before any."""
        return self._visits["last_visit"]

    def forget(self) -> None:
        """Free the fetched columns."""
        self._fetched.arrays.clear()
        self._visits.arrays.clear()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that no shard has."""
        return {"times_pruned": self.times_pruned}


class _Fetched(UserDict[str, NDArray[Any]]):
    """Arrays that are fetched when they are first read."""

    def __init__(self, fetches: Mapping[str, Callable[[], NDArray[Any]]]) -> None:
        self.data, self._fetches = dict.fromkeys(fetches, np.empty(0)), fetches
        self.arrays: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.arrays:
            self.arrays[name] = self._fetches[name]()
        return self.arrays[name]


def joined_facts(facts: list[ShardFacts]) -> tuple[int, list[int], dict[str, list[float]]]:
    """Return the number of non-finite signals in the epoch, the first samples with one, and the score quantiles."""
    ids = [sample for one in facts for sample in one.nonfinite_ids][:MAX_NONFINITE_IDS]
    values = {name: np.concatenate([one.values[name] for one in facts]) for name in facts[0].values}
    return sum(one.num_nonfinite for one in facts), ids, quantiles_of(values)
