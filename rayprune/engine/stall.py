"""Who waits for what, since when: workers pulse, the driver notices silence.

A pulse is what a rank is doing and for how long; a thread of the worker sends one a second to the ScoreActor, also
while training is stuck in a call. The driver reads them and reports each stall once, and its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from rayprune.engine.client import ScoreClient
from rayprune.engine.protocol import Pulse

_PULSE_S = 1.0


class Pulsing:
    """Send this rank's pulse; `doing` is cheap enough for every step.

    Args:
        scores: the ScoreActor; one in this process needs no pulses.
        generation: this attempt's number.
        rank, world_size: this worker, and how many there are.
    """

    def __init__(self, scores: ScoreClient, generation: int, rank: int, world_size: int) -> None:
        self._scores, self._generation, self._rank, self._world_size = scores, generation, rank, world_size
        self._doing = ("starts", time.monotonic())
        self._done = threading.Event()
        if not scores.is_local:
            threading.Thread(target=self._send, name="rayprune-pulse", daemon=True).start()

    def doing(self, what: str) -> None:
        """Say what the rank does from now on."""
        self._doing = (what, time.monotonic())

    def stop(self) -> None:
        """Send no more."""
        self._done.set()

    def _send(self) -> None:
        while True:
            doing, since = self._doing
            now = time.monotonic()
            self._scores.pulse(self._generation, self._rank, self._world_size, doing, now - since)
            if self._done.wait(_PULSE_S):
                return


class StallWatch:
    """Turn pulses into lines for a person.

    Args:
        limit_s: silence or waiting from which on it is a stall.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._answered_at = time.monotonic()
        self._reported: dict[str, str] = {}

    def look(self, pulses: Mapping[int, Pulse] | None) -> list[str]:
        """Return a line for each stall that is new or of a new kind, and for each that is over.

        Args:
            pulses: rank → pulse, or None when the ScoreActor did not answer.
        """
        now = time.monotonic()
        stalls: dict[str, tuple[str, str]] = {}  # who → kind, text
        if pulses is None:
            silent_s = now - self._answered_at
            if silent_s > self._limit_s:
                stalls["the ScoreActor"] = ("silent", f"has not answered for {silent_s:.0f} s")
            # Nothing is known of the ranks: what was reported of them stands.
            stalls |= {who: (kind, "") for who, kind in self._reported.items() if who not in stalls}
        else:
            self._answered_at = now
            for rank, pulse in sorted(pulses.items()):
                if pulse.silent_s > self._limit_s:
                    text = f"has been silent for {pulse.silent_s:.0f} s; it last said: {pulse.doing}"
                    stalls[f"rank {rank}"] = ("silent", text)
                elif pulse.doing_s > self._limit_s:
                    stalls[f"rank {rank}"] = (pulse.doing, f"{pulse.doing} since {pulse.doing_s:.0f} s")
        lines = [f"stall: {who} {text}" for who, (kind, text) in stalls.items() if self._reported.get(who) != kind]
        lines += [f"stall over: {who} goes on" for who in sorted(self._reported.keys() - stalls.keys())]
        self._reported = {who: kind for who, (kind, _) in stalls.items()}
        return lines
