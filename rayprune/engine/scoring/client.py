"""Typed calls to a ScoreActor, whether it is a Ray actor or an object of this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, Self, TypeVar

import ray
from numpy.typing import NDArray

from rayprune.engine.scoring.actor import AuditRecord, LoopActor, LoopSettings, ScoreActor, ScoreSpec, WantedRows
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
from rayprune.errors import CheckpointPending

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_CHECKPOINT_TIMEOUT_S, _RETRY_S = 600.0, 0.2


class Channel(Protocol):
    """The way to one ScoreActor; `method` is the name of a method of its class.

    Attributes:
        name: the actor's name in its cluster, "" inside this process.
    """

    @property
    def name(self) -> str: ...

    def call(self, method: str, *args: Any) -> Any:
        """Call and wait for the result."""

    def post(self, method: str, *args: Any) -> None:
        """Call without waiting; errors are lost."""

    def try_call(self, method: str, timeout_s: float) -> Any:
        """Call and wait for up to `timeout_s`; return None without an answer."""


class LocalChannel:
    """Calls an actor object in this process."""

    name = ""

    def __init__(self, actor: ScoreActor) -> None:
        self.actor = actor

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method)(*args)

    def post(self, method: str, *args: Any) -> None:
        self.call(method, *args)

    def try_call(self, method: str, timeout_s: float) -> Any:
        return self.call(method)


@dataclass(frozen=True)
class RayChannel:
    """Calls a Ray actor by its name; picklable. The actor ends with the process that created it."""

    name: str
    namespace: str

    @property
    def handle(self) -> Any:
        """The actor's handle, looked up once per process."""
        key = (self.name, self.namespace)
        if key not in _HANDLES:
            _HANDLES[key] = ray.get_actor(self.name, self.namespace)
        return _HANDLES[key]

    def call(self, method: str, *args: Any) -> Any:
        # Ray holds a call back while the actor restarts; the actor may then need a checkpoint that is not written yet.
        deadline = time.monotonic() + _CHECKPOINT_TIMEOUT_S
        while True:
            try:
                return ray.get(getattr(self.handle, method).remote(*args))
            except CheckpointPending:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)

    def post(self, method: str, *args: Any) -> None:
        getattr(self.handle, method).remote(*args)

    def try_call(self, method: str, timeout_s: float) -> Any:
        try:
            return ray.get(getattr(self.handle, method).remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no actor has this name
            logger.debug("no answer to %s: %s", method, error)
            return None


_HANDLES: dict[tuple[str, str], Any] = {}


class ScoreClient:
    """Calls a ScoreActor. A method has the arguments, result and errors of the actor's method of the same name.

    Args:
        channel: the way to the actor.
    """

    actor_class: ClassVar[type[ScoreActor]] = ScoreActor

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    @classmethod
    def in_process(cls, spec: ScoreSpec) -> Self:
        """Return the client of a new actor object in this process."""
        return cls(LocalChannel(cls.actor_class(spec)))

    @classmethod
    def start(cls, spec: ScoreSpec, name: str) -> tuple[Self, Any]:
        """Start a Ray actor; return its client and the handle that keeps the actor alive."""
        # Without a CPU of its own: selection is short, and a reserved core would be lost to training.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        handle = ray.remote(cls.actor_class).options(name=name, **options).remote(spec)
        return cls(RayChannel(name, ray.get_runtime_context().namespace)), handle

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
        (self._call if wait else self._post)(ScoreActor.observe, key, push)

    def arrive(self, key: AttemptKey, barrier: Barrier, rank: int, num_pushes: int) -> list[int]:
        return self._call(ScoreActor.arrive, key, barrier, rank, num_pushes)

    def absent_ranks(self, key: AttemptKey, barrier: Barrier) -> list[int]:
        return self._call(ScoreActor.absent_ranks, key, barrier)

    def pass_barrier(self, key: AttemptKey, barrier: Barrier, with_state: bool = True) -> EpochSnapshot | None:
        return self._call(ScoreActor.pass_barrier, key, barrier, with_state)

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
        return self._try_call(ScoreActor.progress, timeout_s)

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
