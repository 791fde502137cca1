"""The way to an actor, whether it is a Ray actor or an object of this process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ray

from rayprune.errors import CheckpointPending

logger = logging.getLogger(__name__)

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

    def begin(self, method: str, *args: Any) -> Callable[[], Any]:
        """Call; return a function that waits for the result."""

    def post(self, method: str, *args: Any) -> None:
        """Call without waiting; errors are lost."""

    def try_call(self, method: str, timeout_s: float) -> Any:
        """Call and wait for up to `timeout_s`; return None without an answer."""


class LocalChannel:
    """Calls an actor object in this process."""

    name = ""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method)(*args)

    def begin(self, method: str, *args: Any) -> Callable[[], Any]:
        return partial(self.call, method, *args)

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
        return self.begin(method, *args)()

    def begin(self, method: str, *args: Any) -> Callable[[], Any]:
        answer = getattr(self.handle, method).remote(*args)
        return partial(self._wait, answer, method, *args)

    def _wait(self, answer: Any, method: str, *args: Any) -> Any:
        # Ray holds a call back while the actor restarts; the actor may then need a checkpoint that is not written yet.
        deadline = time.monotonic() + _CHECKPOINT_TIMEOUT_S
        while True:
            try:
                return ray.get(answer)
            except CheckpointPending:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
                answer = getattr(self.handle, method).remote(*args)

    def post(self, method: str, *args: Any) -> None:
        getattr(self.handle, method).remote(*args)

    def try_call(self, method: str, timeout_s: float) -> Any:
        try:
            return ray.get(getattr(self.handle, method).remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no actor has this name
            logger.debug("no answer to %s: %s", method, error)
            return None


_HANDLES: dict[tuple[str, str], Any] = {}


def start_actor(actor_class: type, name: str, *args: Any, **options: Any) -> tuple[RayChannel, Any]:
    """Start a Ray actor that Ray restarts without limit; return the way to it and the handle that keeps it alive."""
    # Without a CPU of its own: its work is short, and a reserved core would be lost to training.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, **options}
    handle: Any = ray.remote(actor_class).options(name=name, **options).remote(*args)
    return RayChannel(name, ray.get_runtime_context().namespace), handle
