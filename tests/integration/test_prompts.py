"""The named actor of a PromptSelector: reward workers in other processes, errors, resuming, and its end."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray

import rayprune
from rayprune.prompts.sampler import PromptSampler


@pytest.fixture
def client() -> Iterator[rayprune.PromptClient]:
    client = rayprune.serve_prompts(rayprune.PromptSelector(40, "zero_variance", group_size=4), "math")
    yield client
    client.close()


def repeat(call: Callable[[], object]) -> None:
    """Call until it fails: Ray takes a moment to notice that a process has ended."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        call()
        time.sleep(0.02)


@ray.remote(num_cpus=0.5)
def report(ids: list[int], wait: bool) -> int:
    """A reward worker: one reward at a time, all solved."""
    own = rayprune.connect_prompts("math")
    for prompt in ids:
        own.observe([prompt], [1.0], wait=wait)
    own.flush()
    return len(own)


def test_reward_workers_reach_it_by_name(client: rayprune.PromptClient) -> None:
    assert len(client) == 40
    ids = client.next(8)
    ids[0] += 0  # it may be changed
    tasks = [report.remote(ids.tolist(), wait) for wait in (True, False, True, False)]
    assert ray.get(tasks) == [40] * 4
    scores = client.scores()
    assert np.flatnonzero(scores["visits"]).tolist() == sorted(ids.tolist())
    assert (scores["streak"][ids] == 1).all()
    assert client.num_pending == 0
    assert client.zero_variance == 1.0
    assert client.draws_for(1) == 40


def test_it_does_as_a_local_selector(client: rayprune.PromptClient) -> None:
    local = rayprune.PromptSelector(40, "zero_variance", group_size=4)
    for number in range(20):
        ids = local.next(7)
        assert np.array_equal(client.next(7), ids)
        rewards = np.random.default_rng(number).integers(0, 2, (7, 4))
        for each in (client, local):
            each.observe(ids, rewards)
    state = client.state_dict()
    local.load_state_dict(state)
    following = local.next(9)
    assert np.array_equal(client.next(9), following)
    client.load_state_dict(state)
    assert np.array_equal(client.next(9), following)


def test_errors_are_those_of_the_selector(client: rayprune.PromptClient) -> None:
    with pytest.raises(rayprune.ConfigError, match="unknown id 99") as raised:
        client.observe([99], [1.0])
    assert "\n" not in str(raised.value)
    with pytest.raises(rayprune.ConfigError, match="n 41 must be"):
        client.next(41)
    client.observe([3], [2.0], wait=False)
    client.observe([3], [1.0], wait=False)
    with pytest.raises(rayprune.ConfigError, match="reward 2 is outside"):
        client.flush()
    client.flush()
    assert client.num_pending == 1
    with pytest.raises(rayprune.ConfigError, match=r"already running.*connect_prompts\('math'\)"):
        rayprune.serve_prompts(rayprune.PromptSelector(3), "math")


def test_a_client_is_picklable_and_a_sampler_takes_the_name(client: rayprune.PromptClient) -> None:
    copied: Any = pickle.loads(pickle.dumps(client))
    copied.observe([0] * 4, [0.0, 1.0, 0.0, 1.0])
    assert client.scores()["visits"][0] == 1
    sampler = PromptSampler(range(40), 80, draw=8, actor="math")
    assert len(list(sampler)) == 80
    assert client.scores()["draws"].sum() == 80
    assert "selector" not in sampler.state_dict()
    with pytest.raises(rayprune.ConfigError, match="selects among 40 prompts, the data has 3"):
        PromptSampler(range(3), actor="math")


def test_the_end_of_an_actor() -> None:
    client = rayprune.serve_prompts(rayprune.PromptSelector(4), "short")
    other = rayprune.connect_prompts("short")
    client.close()
    with pytest.raises(rayprune.ClusterError, match="'short' has ended"):
        repeat(lambda: other.next(1))
    with pytest.raises(rayprune.ClusterError, match="no prompt actor 'short'"):
        repeat(lambda: rayprune.connect_prompts("short"))


@ray.remote(num_cpus=0.5)
class Creator:
    """A process that starts an actor and ends."""

    def start(self, name: str, detached: bool) -> None:
        rayprune.serve_prompts(rayprune.PromptSelector(4), name, detached=detached)


def test_a_detached_actor_outlives_its_creator() -> None:
    creator = Creator.remote()  # type: ignore[attr-defined]
    ray.get([creator.start.remote("kept", True), creator.start.remote("lost", False)])
    assert len(rayprune.connect_prompts("lost")) == 4
    lost = rayprune.connect_prompts("lost")
    ray.kill(creator)
    kept = rayprune.connect_prompts("kept")
    assert kept.next(2).size == 2
    with pytest.raises(rayprune.ClusterError):
        repeat(lambda: lost.next(1))
    kept.close()
