"""A PromptSelector as a named Ray actor, which reward workers in other processes reach by its name."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
from numpy.typing import ArrayLike, NDArray

from rayprune.errors import ClusterError, ConfigError, RaypruneError, UsageError
from rayprune.prompts.rewards import Ids
from rayprune.prompts.selector import PromptSelector

NAMESPACE = "rayprune"
_MAX_POSTED = 1000  # observations under way from one client; the oldest is waited for beyond that
# Without its creator's handle, an actor that is not detached ends.
_OWNED: dict[tuple[str, str], Any] = {}


class PromptActor:
    """Runs in the actor's process; calls are served one after the other."""

    def __init__(self, selector: PromptSelector) -> None:
        self._selector = selector

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the selector."""
        return getattr(self._selector, method)(*args)

    def numbers(self) -> dict[str, float]:
        """Return the selector's properties."""
        return {"num_pending": self._selector.num_pending, "zero_variance": self._selector.zero_variance}

    def length(self) -> int:
        """Return N."""
        return len(self._selector)


class PromptClient:
    """Calls the PromptSelector of a named actor; its methods are those of `PromptSelector`. Picklable, thread-safe.

    `rayprune.serve_prompts` and `rayprune.connect_prompts` return it.

    Raises:
        ClusterError: the actor has ended; for every method.
    """

    def __init__(self, name: str, namespace: str, actor: Any) -> None:
        self.name, self.namespace = name, namespace
        self._actor = actor
        self._posted: list[Any] = []
        self._lock = threading.Lock()
        self._length = int(self._wait(actor.length.remote()))

    def __reduce__(self) -> tuple[Any, ...]:
        return connect_prompts, (self.name, self.namespace)

    def __len__(self) -> int:
        return self._length

    def next(self, n: int) -> Ids:
        """Return the prompts of the next rollouts, (n,) int64; see `PromptSelector.next`."""
        return np.array(self._call("next", n))

    def draws_for(self, useful: int, safety: float = 1.25, most: int | None = None) -> int:
        """Return how many prompts to draw; see `PromptSelector.draws_for`."""
        return int(self._call("draws_for", useful, safety, most))

    def observe(self, ids: ArrayLike, rewards: ArrayLike, *, wait: bool = True) -> None:
        """Learn from rewards; see `PromptSelector.observe`.

        Args:
            ids: (B,) integers.
            rewards: (B,) or (B, G) numbers.
            wait: wait until the actor has them. Without it, the call returns at once, and `flush` raises its errors.
        """
        arrays = np.asarray(ids), np.asarray(rewards)
        if wait:
            self._call("observe", *arrays)
            return
        with self._lock:
            self._posted.append(self._actor.call.remote("observe", *arrays))
            oldest = self._posted.pop(0) if len(self._posted) > _MAX_POSTED else None
        if oldest is not None:
            self._wait(oldest)

    def flush(self) -> None:
        """Wait until the actor has all observations of this client; raise the error of the first that it refused."""
        with self._lock:
            posted, self._posted = self._posted, []
        error: RaypruneError | None = None
        for reference in posted:
            try:
                self._wait(reference)
            except RaypruneError as refused:
                error = error or refused
        if error is not None:
            raise error

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return what is known of the prompts, name → (N,); see `PromptSelector.scores`."""
        return {name: np.array(column) for name, column in self._call("scores").items()}

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return the whole state, with all observations of this client; see `PromptSelector.state_dict`."""
        self.flush()
        return {name: np.array(array) for name, array in self._call("state_dict").items()}

    def load_state_dict(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Restore a state of `state_dict`, this client's or a PromptSelector's."""
        self.flush()
        self._call("load_state_dict", dict(state))

    @property
    def num_pending(self) -> int:
        """The number of observed rewards whose groups are not complete."""
        return int(self._wait(self._actor.numbers.remote())["num_pending"])

    @property
    def zero_variance(self) -> float:
        """The share of groups without variance in the last full batch of groups."""
        return float(self._wait(self._actor.numbers.remote())["zero_variance"])

    def close(self) -> None:
        """End the actor, for all clients; its state is lost."""
        _OWNED.pop((self.name, self.namespace), None)
        ray.kill(self._actor)

    def _call(self, method: str, *args: Any) -> Any:
        return self._wait(self._actor.call.remote(method, *args))

    def _wait(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RaypruneError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError:
            raise ClusterError(
                f"the prompt actor {self.name!r} has ended: start it again with serve_prompts and load the last "
                "state_dict(); an actor lives as long as the process that started it, or detached=True"
            ) from None


def serve_prompts(
    selector: PromptSelector, name: str, *, namespace: str = NAMESPACE, detached: bool = False
) -> PromptClient:
    """Start a named actor with a copy of a PromptSelector.

    The actor takes no CPU of the cluster's. It is not restarted when its process dies, as its state would be lost:
    keep `state_dict()` in your checkpoints.

    Args:
        selector: the actor gets a copy, with its state.
        name: the name by which `connect_prompts` finds the actor.
        namespace: the Ray namespace; the default is the same for all jobs of a cluster.
        detached: keep the actor when this process ends, until `close`.

    Returns:
        A client; it has the methods of PromptSelector.

    Raises:
        ConfigError: the name is taken, or `selector` is no PromptSelector.
        UsageError: Ray is not running in this process.
    """
    if not isinstance(selector, PromptSelector):
        raise ConfigError(f"serve_prompts takes a PromptSelector, got {type(selector).__name__}")
    if not name:
        raise ConfigError("name '' cannot be found again: give a name")
    _check_running()
    options: dict[str, Any] = {"name": name, "namespace": namespace, "num_cpus": 0, "max_restarts": 0}
    if detached:
        options["lifetime"] = "detached"
    try:
        actor = ray.remote(PromptActor).options(**options).remote(selector)
    except ValueError:  # Ray's ActorAlreadyExistsError, too
        raise ConfigError(
            f"an actor {name!r} is already running in namespace {namespace!r}: connect_prompts({name!r}) uses it, and "
            "its close() ends it"
        ) from None
    _OWNED[name, namespace] = actor
    return PromptClient(name, namespace, actor)


def connect_prompts(name: str, namespace: str = NAMESPACE) -> PromptClient:
    """Return a client of an actor that `serve_prompts` started, in any process or job of the cluster.

    Args:
        name: the actor's name.
        namespace: that of `serve_prompts`.

    Raises:
        ClusterError: no actor has this name.
        UsageError: Ray is not running in this process.
    """
    _check_running()
    try:
        actor = ray.get_actor(name, namespace)
    except ValueError:
        raise ClusterError(
            f"no prompt actor {name!r} in namespace {namespace!r}: start it with serve_prompts(selector, {name!r}) "
            "and keep that process alive"
        ) from None
    return PromptClient(name, namespace, actor)


def _check_running() -> None:
    if not ray.is_initialized():
        raise UsageError("Ray is not running in this process: call ray.init() first")
