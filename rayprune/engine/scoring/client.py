"""Typed calls to a ScoreActor and its shards, whether they are Ray actors or objects of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

from numpy.typing import NDArray

from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.channel import Channel, LocalChannel, start_actor
from rayprune.engine.scoring.loop_actor import AuditRecord, LoopActor, LoopSettings, WantedRows
from rayprune.engine.scoring.messages import (
    AttemptKey,
    Barrier,
    EpochSnapshot,
    Phase,
    PlanBlock,
    PlanHeader,
    PlanPass,
    Pulse,
    Push,
    RankRows,
    StopReason,
)
from rayprune.engine.scoring.shards import Incarnations, ShardGroup
from rayprune.engine.scoring.spec import ScoreSpec

P = ParamSpec("P")
R = TypeVar("R")


class ScoreClient:
    """Calls a ScoreActor. A method has the arguments, result and errors of the actor's method of the same name.

    Args:
        channel: the way to the actor.
        shards: the actors that hold the score table, if not this one.
    """

    actor_class: ClassVar[type[ScoreActor]] = ScoreActor

    def __init__(self, channel: Channel, shards: ShardGroup | None = None) -> None:
        self.channel, self.shards = channel, shards

    @classmethod
    def in_process(cls, spec: ScoreSpec, num_shards: int = 1) -> Self:
        """Return the client of a new actor object in this process, and of its shards if there are several."""
        shards = ShardGroup.in_process(spec, num_shards) if num_shards > 1 else None
        return cls(LocalChannel(cls.actor_class(replace(spec, shards=shards))), shards)

    @classmethod
    def start(cls, spec: ScoreSpec, name: str, num_shards: int = 1) -> tuple[Self, list[Any]]:
        """Start a Ray actor and its shards, if there are several; return their client and their handles.

        The actors live as long as the handles.
        """
        shards, handles = ShardGroup.start(spec, name, num_shards) if num_shards > 1 else (None, [])
        channel, handle = start_actor(cls.actor_class, name, replace(spec, shards=shards))
        return cls(channel, shards), [handle, *handles]

    @property
    def name(self) -> str:
        """The actor's name in its cluster, "" inside this process."""
        return self.channel.name

    @property
    def is_local(self) -> bool:
        """Whether the actor lives in this process."""
        return isinstance(self.channel, LocalChannel)

    def _call(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        assert not kwargs, "channels pass arguments by position"
        result: R = self.channel.call(method.__name__, *args)
        return result

    def _post(self, method: Callable[Concatenate[Any, P], object], *args: P.args, **kwargs: P.kwargs) -> None:
        assert not kwargs, "channels pass arguments by position"
        self.channel.post(method.__name__, *args)

    def _try_call(self, method: Callable[[Any], R], timeout_s: float) -> R | None:
        result: R | None = self.channel.try_call(method.__name__, timeout_s)
        return result

    def announce(self, plan_pass: PlanPass) -> PlanHeader:
        return self._call(ScoreActor.announce, plan_pass)

    def rank_rows(self, plan_pass: PlanPass, rank: int, start_step: int, stop_step: int) -> RankRows:
        return self._call(ScoreActor.rank_rows, plan_pass, rank, start_step, stop_step)

    def blocks(self) -> tuple[Phase | None, list[PlanBlock]]:
        return self._call(ScoreActor.blocks)

    def observe(self, key: AttemptKey, push: Push, *, wait: bool = True) -> None:
        """Call ScoreActor.observe; with `wait=False` a failure shows as a lost push at the next barrier."""
        if self.shards is not None:
            self.shards.observe(key, push, wait=wait)
        else:
            (self._call if wait else self._post)(ScoreActor.observe, key, push)

    def arrive(self, key: AttemptKey, barrier: Barrier, rank: int, num_pushes: int) -> list[int]:
        incarnations: Incarnations = ()
        if self.shards is not None:
            incarnations, lost = self.shards.lost(key, rank, num_pushes)
            if lost:
                return lost
            num_pushes = 0  # to the ScoreActor itself
        return self._call(ScoreActor.arrive, key, barrier, rank, num_pushes, incarnations)

    def absent_ranks(self, key: AttemptKey, barrier: Barrier) -> list[int]:
        return self._call(ScoreActor.absent_ranks, key, barrier)

    def pass_barrier(self, key: AttemptKey, barrier: Barrier, with_state: bool = True) -> EpochSnapshot | None:
        if self.shards is None or not with_state:
            return self._call(ScoreActor.pass_barrier, key, barrier, with_state)
        if self.absent_ranks(key, barrier):
            return None  # without another call: the ranks may have arrived since, and the state would lack the table
        # The shards first: once the epoch is closed, a shard that dies can no longer have its observations repeated.
        table = self.shards.table(key)
        snapshot = self._call(ScoreActor.pass_barrier, key, barrier, with_state)
        return snapshot and replace(snapshot, state={**snapshot.state, **table})

    def scores(self) -> dict[str, NDArray[Any]]:
        return self._call(ScoreActor.scores)

    def generation(self) -> int:
        return self._call(ScoreActor.generation)

    def stop(self, reason: StopReason) -> None:
        self._call(ScoreActor.stop, reason)

    def stop_reason(self) -> StopReason | None:
        return self._call(ScoreActor.stop_reason)

    def is_pausing(self) -> bool:
        return self._call(ScoreActor.is_pausing)

    def pause(self, timeout_s: float) -> None:
        """Call ScoreActor.pause; does nothing without an answer."""
        self._try_call(ScoreActor.pause, timeout_s)

    def progress(self, timeout_s: float) -> tuple[int, int, int] | None:
        """Call ScoreActor.progress; return None without an answer."""
        progress = self._try_call(ScoreActor.progress, timeout_s)
        if progress is None or self.shards is None:
            return progress
        epoch, _, num_rows = progress
        return epoch, self.shards.num_observed(timeout_s), num_rows

    def pulses(self, timeout_s: float) -> dict[int, Pulse] | None:
        """Call ScoreActor.pulses; return None without an answer."""
        return self._try_call(ScoreActor.pulses, timeout_s)

    def pulse(self, generation: int, rank: int, world_size: int, doing: str, doing_s: float) -> None:
        """Call ScoreActor.pulse without waiting."""
        self._post(ScoreActor.pulse, generation, rank, world_size, doing, doing_s)


class LoopClient(ScoreClient):
    """Calls a LoopActor, as ScoreClient calls a ScoreActor."""

    actor_class = LoopActor

    def settings(self) -> LoopSettings:
        return self._call(LoopActor.settings)

    def restore(self, generation: int, epoch: int, state: Mapping[str, NDArray[Any]] | None) -> None:
        self._call(LoopActor.restore, generation, epoch, state)

    def log_epoch(self, line: Mapping[str, Any]) -> dict[str, Any]:
        return self._call(LoopActor.log_epoch, line)

    def audit_record(self) -> AuditRecord | None:
        return self._call(LoopActor.audit_record)

    def wanted_rows(self, known: tuple[Any, ...] | None) -> WantedRows | None:
        return self._call(LoopActor.wanted_rows, known)
