"""Typed calls to the ScoreActor, whether it is a Ray actor or an object of this process.

`ScoreClient` has one method for each call of a `ScoreActor`, `LoopClient` those of a `LoopActor` too. A channel carries
the calls: `LocalChannel` inside this process (num_workers 0), `RayChannel` to a Ray actor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, Self, TypeVar

import ray
from numpy.typing import NDArray

from rayprune.engine.scoring.actor import LoopActor, LoopSettings, ScoreActor, ScoreSpec, Wanted
from rayprune.engine.scoring.messages import (
    AttemptKey,
    Barrier,
    EpochSnapshot,
    PlanBlock,
    PlanHeader,
    PlanPass,
    Pulse,
    Push,
    RankRows,
)
from rayprune.errors import CheckpointPending

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_CHECKPOINT_TIMEOUT_S, _RETRY_S = 600.0, 0.2


class Channel(Protocol):
    """Carry calls to one ScoreActor; `method` is a name of the actor's class.

    Attributes:
        name: of the actor in its cluster; "" in this process.
    """

    @property
    def name(self) -> str:
        """See the class."""

    def call(self, method: str, *args: Any) -> Any:
        """Call and wait for the answer."""

    def post(self, method: str, *args: Any) -> None:
        """Call without waiting; a failure shows at the next barrier."""

    def ask(self, method: str, timeout_s: float) -> Any:
        """Call and wait for at most `timeout_s`; return None when there is no answer."""


class LocalChannel:
    """Call an actor object in this process."""

    name = ""

    def __init__(self, actor: ScoreActor) -> None:
        self.actor = actor

    def call(self, method: str, *args: Any) -> Any:
        """See Channel."""
        return getattr(self.actor, method)(*args)

    def post(self, method: str, *args: Any) -> None:
        """See Channel."""
        self.call(method, *args)

    def ask(self, method: str, timeout_s: float) -> Any:
        """See Channel; the answer is immediate."""
        return self.call(method)


@dataclass(frozen=True)
class RayChannel:
    """Call a Ray actor, found by name; picklable.

    The actor belongs to the process that created it and ends with it.
    """

    name: str
    namespace: str

    @property
    def handle(self) -> Any:
        """The actor's handle, looked up once in each process."""
        key = (self.name, self.namespace)
        if key not in _HANDLES:
            _HANDLES[key] = ray.get_actor(self.name, self.namespace)
        return _HANDLES[key]

    def call(self, method: str, *args: Any) -> Any:
        """See Channel; while the actor restarts, Ray holds the call back and sends it again.

        Raises:
            CheckpointPending: the checkpoint that a restarted actor needs was not there after 10 minutes.
        """
        deadline = time.monotonic() + _CHECKPOINT_TIMEOUT_S
        while True:
            try:
                return ray.get(getattr(self.handle, method).remote(*args))
            except CheckpointPending:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)

    def post(self, method: str, *args: Any) -> None:
        """See Channel."""
        getattr(self.handle, method).remote(*args)

    def ask(self, method: str, timeout_s: float) -> Any:
        """See Channel; there is no answer when the actor is busy, restarting or gone."""
        try:
            return ray.get(getattr(self.handle, method).remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no actor has this name
            logger.debug("%s was not answered: %s", method, error)
            return None


_HANDLES: dict[tuple[str, str], Any] = {}


class ScoreClient:
    """Call a ScoreActor; every method has the actor's arguments and result.

    Args:
        channel: how calls reach the actor.
    """

    actor_class: ClassVar[type[ScoreActor]] = ScoreActor

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    @classmethod
    def in_process(cls, spec: ScoreSpec) -> Self:
        """Return a client of a new actor object in this process."""
        return cls(LocalChannel(cls.actor_class(spec)))

    @classmethod
    def start(cls, spec: ScoreSpec, name: str) -> tuple[Self, Any]:
        """Start a Ray actor; return its client and the handle that keeps it alive."""
        # No CPU of its own: selection is short, and a reserved core would be lost to training.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        handle = ray.remote(cls.actor_class).options(name=name, **options).remote(spec)
        return cls(RayChannel(name, ray.get_runtime_context().namespace)), handle

    @property
    def name(self) -> str:
        """The actor's name in its cluster; "" in this process."""
        return self.channel.name

    @property
    def is_local(self) -> bool:
        """Whether the actor lives in this process."""
        return isinstance(self.channel, LocalChannel)

    def _call(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        answer: R = self.channel.call(method.__name__, *args)
        return answer

    def _post(self, method: Callable[Concatenate[Any, P], object], *args: P.args, **kwargs: P.kwargs) -> None:
        self.channel.post(method.__name__, *args)

    def _ask(self, method: Callable[[Any], R], timeout_s: float) -> R | None:
        answer: R | None = self.channel.ask(method.__name__, timeout_s)
        return answer

    def announce(self, plan_pass: PlanPass) -> PlanHeader:
        """See ScoreActor.announce."""
        return self._call(ScoreActor.announce, plan_pass)

    def rank_rows(self, plan_pass: PlanPass, rank: int, start_step: int, stop_step: int) -> RankRows:
        """See ScoreActor.rank_rows."""
        return self._call(ScoreActor.rank_rows, plan_pass, rank, start_step, stop_step)

    def blocks(self) -> tuple[str, list[PlanBlock]]:
        """See ScoreActor.blocks."""
        return self._call(ScoreActor.blocks)

    def observe(self, key: AttemptKey, push: Push, *, wait: bool = True) -> None:
        """See ScoreActor.observe; without `wait`, a failure shows at the next barrier."""
        send = self._call if wait else self._post
        send(ScoreActor.observe, key, push)

    def arrive(self, key: AttemptKey, barrier: Barrier, rank: int, num_pushes: int) -> list[int]:
        """See ScoreActor.arrive."""
        return self._call(ScoreActor.arrive, key, barrier, rank, num_pushes)

    def absent_ranks(self, key: AttemptKey, barrier: Barrier) -> list[int]:
        """See ScoreActor.absent_ranks."""
        return self._call(ScoreActor.absent_ranks, key, barrier)

    def pass_barrier(self, key: AttemptKey, barrier: Barrier, with_state: bool = True) -> EpochSnapshot | None:
        """See ScoreActor.pass_barrier."""
        return self._call(ScoreActor.pass_barrier, key, barrier, with_state)

    def generation(self) -> int:
        """See ScoreActor.generation."""
        return self._call(ScoreActor.generation)

    def stop(self, reason: str, failed: bool) -> None:
        """See ScoreActor.stop."""
        self._call(ScoreActor.stop, reason, failed)

    def stopped(self) -> tuple[str, bool] | None:
        """See ScoreActor.stopped."""
        return self._call(ScoreActor.stopped)

    def pause(self, timeout_s: float) -> None:
        """See ScoreActor.pause; does nothing when the actor does not answer."""
        self._ask(ScoreActor.pause, timeout_s)

    def pausing(self) -> bool:
        """See ScoreActor.pausing."""
        return self._call(ScoreActor.pausing)

    def progress(self, timeout_s: float) -> tuple[int, int, int] | None:
        """See ScoreActor.progress; None when the actor does not answer."""
        return self._ask(ScoreActor.progress, timeout_s)

    def pulse(self, generation: int, rank: int, world_size: int, doing: str, doing_s: float) -> None:
        """See ScoreActor.pulse; does not wait."""
        self._post(ScoreActor.pulse, generation, rank, world_size, doing, doing_s)

    def pulses(self, timeout_s: float) -> dict[int, Pulse] | None:
        """See ScoreActor.pulses; None when the actor does not answer."""
        return self._ask(ScoreActor.pulses, timeout_s)


class LoopClient(ScoreClient):
    """Call a LoopActor; every method has the actor's arguments and result."""

    actor_class = LoopActor

    def terms(self) -> LoopSettings:
        """See LoopActor.terms."""
        return self._call(LoopActor.terms)

    def restore(self, generation: int, epoch: int, state: Mapping[str, NDArray[Any]] | None) -> None:
        """See LoopActor.restore."""
        self._call(LoopActor.restore, generation, epoch, state)

    def wanted(self, known: tuple[Any, ...] | None) -> Wanted | None:
        """See LoopActor.wanted."""
        return self._call(LoopActor.wanted, known)

    def scores(self) -> dict[str, NDArray[Any]]:
        """See LoopActor.scores."""
        return self._call(LoopActor.scores)
