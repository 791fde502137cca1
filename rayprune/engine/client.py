"""One way to call the ScoreActor, whether it is a Ray actor or an object of this process."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from rayprune.engine.actor import ScoreActor, ScoreSpec
from rayprune.engine.protocol import StateOnItsWay

logger = logging.getLogger(__name__)

_STATE_S, _AGAIN_S = 600.0, 0.2


class ScoreClient(Protocol):
    """Call the methods of a ScoreActor by name."""

    def call(self, method: str, *args: Any) -> Any:
        """Call and wait for the answer."""

    def post(self, method: str, *args: Any) -> None:
        """Call without waiting; a failure shows at the flush."""

    def ask(self, method: str, timeout_s: float) -> Any:
        """Call and wait for so long; return None when there is no answer."""


class LocalScores:
    """A ScoreActor in this process (num_workers 0)."""

    def __init__(self, spec: ScoreSpec, actor_class: type[ScoreActor] = ScoreActor) -> None:
        self._actor = actor_class(spec)

    def call(self, method: str, *args: Any) -> Any:
        """Call directly."""
        return getattr(self._actor, method)(*args)

    def post(self, method: str, *args: Any) -> None:
        """Call directly."""
        getattr(self._actor, method)(*args)

    def ask(self, method: str, timeout_s: float) -> Any:
        """Call directly."""
        return self.call(method)


@dataclass(frozen=True)
class RemoteScores:
    """A ScoreActor in a Ray actor, found by name; picklable.

    The actor belongs to the process that created it and ends with it.
    """

    name: str
    namespace: str

    @staticmethod
    def create(spec: ScoreSpec, name: str, actor_class: type[ScoreActor] = ScoreActor) -> tuple[RemoteScores, Any]:
        """Start the actor; return the client and the handle that keeps it alive."""
        # No CPU of its own: selection is short, and a reserved core would be lost to training.
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        handle = ray.remote(actor_class).options(name=name, **options).remote(spec)
        return RemoteScores(name, ray.get_runtime_context().namespace), handle

    @property
    def handle(self) -> Any:
        """The actor's handle, looked up once in each process."""
        key = (self.name, self.namespace)
        if key not in _HANDLES:
            _HANDLES[key] = ray.get_actor(self.name, self.namespace)
        return _HANDLES[key]

    def call(self, method: str, *args: Any) -> Any:
        """Call and wait; while the actor restarts, Ray holds the call back and sends it again.

        Raises:
            StateOnItsWay: the checkpoint that a restarted actor needs was not there after 10 minutes.
        """
        deadline = time.monotonic() + _STATE_S
        while True:
            try:
                return ray.get(getattr(self.handle, method).remote(*args))
            except StateOnItsWay:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN_S)

    def post(self, method: str, *args: Any) -> None:
        """Send without waiting."""
        getattr(self.handle, method).remote(*args)

    def ask(self, method: str, timeout_s: float) -> Any:
        """Call and wait for so long; return None when the actor is busy, restarting or gone."""
        try:
            return ray.get(getattr(self.handle, method).remote(), timeout=timeout_s)
        except (ray.exceptions.RayError, ValueError) as error:  # ValueError: no actor of this name
            logger.debug("%s is not answered: %s", method, error)
            return None


_HANDLES: dict[tuple[str, str], Any] = {}
