"""Stalls: each is reported once, with who and since when, and so is its end."""

from __future__ import annotations

import time

from rayprune.engine.monitoring import StallWatch
from rayprune.engine.scoring.actor import ScoreActor, ScoreSpec
from rayprune.engine.scoring.messages import Pulse
from rayprune.sources import open_data

LIMIT_S = 10.0


def test_work_is_no_stall() -> None:
    watch = StallWatch(LIMIT_S)
    assert watch.look({}) == []
    assert watch.look({0: Pulse(1.0, "is in one step", 9.0), 1: Pulse(9.0, "waits for the stream", 9.0)}) == []


def test_a_waiting_rank_is_reported_once_and_again_when_it_goes_on() -> None:
    watch = StallWatch(LIMIT_S)
    waiting = {0: Pulse(0.5, "waits for the stream", 12.0), 1: Pulse(0.5, "is in one step", 0.1)}
    assert watch.look(waiting) == ["stall: rank 0 waits for the stream since 12 s"]
    assert watch.look(waiting) == []
    assert watch.look({**waiting, 0: Pulse(0.5, "is in one step", 0.1)}) == ["stall over: rank 0 goes on"]


def test_a_silent_rank_is_reported_with_what_it_last_said() -> None:
    watch = StallWatch(LIMIT_S)
    assert watch.look({1: Pulse(11.0, "is in one step", 0.2)}) == [
        "stall: rank 1 has been silent for 11 s; it last said: is in one step"
    ]


def test_a_silent_actor_is_reported() -> None:
    watch = StallWatch(0.05)
    assert watch.look(None) == []
    time.sleep(0.1)
    (line,) = watch.look(None)
    assert line.startswith("stall: the ScoreActor has not answered for")
    assert watch.look(None) == []
    assert watch.look({}) == ["stall over: the ScoreActor goes on"]


def test_ranks_stay_stalled_while_nothing_is_known_of_them() -> None:
    watch = StallWatch(LIMIT_S)
    stalled = {0: Pulse(0.5, "waits for the stream", 12.0)}
    assert len(watch.look(stalled)) == 1
    assert watch.look(None) == []
    assert watch.look(stalled) == []


def test_a_rank_that_was_never_heard_is_silent_too() -> None:
    source = open_data("digits", limit=8).train
    actor = ScoreActor(ScoreSpec({"name": "full"}, source, 0, 1, 0, 4, "pad", 64, None, 0))
    actor.pulse(1, 0, 2, "is in one step", 0.0)
    time.sleep(0.1)
    actor.pulse(1, 0, 2, "is in one step", 0.0)
    (line,) = StallWatch(0.05).look(actor.pulses())
    assert line.startswith("stall: rank 1 has been silent")
    actor.pulse(2, 0, 1, "starts", 0.0)
    assert list(actor.pulses()) == [0]
