"""The client has the actor's methods, with the same parameters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from rayprune.engine.scoring.actor import ScoreActor
from rayprune.engine.scoring.channel import LocalChannel
from rayprune.engine.scoring.client import LoopClient, ScoreClient
from rayprune.engine.scoring.loop_actor import LoopActor

NOT_CALLS = {"in_process", "start"}


def calls_of(client: type[ScoreClient]) -> list[str]:
    """Return the names of a client's calls."""
    functions = inspect.getmembers(client, inspect.isfunction)
    return [name for name, _ in functions if not name.startswith("_") and name not in NOT_CALLS]


@pytest.mark.parametrize("name", calls_of(LoopClient))
def test_a_call_has_the_actors_parameters(name: str) -> None:
    ours = inspect.signature(getattr(LoopClient, name)).parameters
    theirs = inspect.signature(getattr(LoopActor, name)).parameters
    # Ray adds the last one in a process that has started an actor.
    extra = {"wait", "timeout_s", "incarnations", "_ray_trace_ctx"}
    assert [each for each in ours if each not in extra] == [each for each in theirs if each not in extra]


def test_every_call_of_the_actor_has_a_method() -> None:
    for client, actor in ((ScoreClient, ScoreActor), (LoopClient, LoopActor)):
        public = [name for name, _ in inspect.getmembers(actor, inspect.isfunction) if not name.startswith("_")]
        assert calls_of(client) == public


class NoisyChannel(LocalChannel):
    """Notes how it is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any) -> Any:
        self.calls.append(("call", method, *args))

    def post(self, method: str, *args: Any) -> None:
        self.calls.append(("post", method, *args))

    def try_call(self, method: str, timeout_s: float) -> Any:
        self.calls.append(("try_call", method, timeout_s))


def test_only_calls_whose_answer_is_needed_are_awaited() -> None:
    channel = NoisyChannel()
    client, key, push = LoopClient(channel), object(), object()
    client.observe(key, push)  # type: ignore[arg-type]
    client.observe(key, push, wait=False)  # type: ignore[arg-type]
    client.pulse(1, 0, 2, "saving", 0.5)
    client.pause(2.0)
    client.wanted_rows(None)
    assert channel.calls == [
        ("call", "observe", key, push),
        ("post", "observe", key, push),
        ("post", "pulse", 1, 0, 2, "saving", 0.5),
        ("try_call", "pause", 2.0),
        ("call", "wanted_rows", None),
    ]
