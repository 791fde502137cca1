"""When all ranks save inside an epoch, and when they leave.

Ranks' clocks differ and saving is collective, so rank 0 decides and tells the others, about twice a second: each
message also names the step of the next one. A count of steps needs no message.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

from rayprune.config_sections import RunSection
from rayprune.engine.client import ScoreClient

Verdict = Literal["go on", "save", "leave"]
_VERDICTS: tuple[Verdict, ...] = ("go on", "save", "leave")

_TALK_S = 0.5
_MOST_STEPS = 256


class Pacer:
    """Decide before each step whether to save or leave first; every rank comes to the same verdict.

    Args:
        scores: asked by rank 0 whether the run is to pause.
        rank, world_size, device: this worker, and where its collective tensors live.
        run: the config's section with checkpoint_steps and checkpoint_minutes.
    """

    def __init__(self, scores: ScoreClient, rank: int, world_size: int, device: torch.device, run: RunSection) -> None:
        self._scores, self._rank, self._world_size, self._device = scores, rank, world_size, device
        self._every_steps, self._every_minutes = run.checkpoint_steps, run.checkpoint_minutes
        self._saved_at = self._talked_at = time.perf_counter()
        self._next_talk, self._talked_step = 0, 0

    def start_epoch(self, step: int) -> None:
        """Begin counting at the step that this attempt has of the epoch; it was saved just now."""
        self._saved_at = self._talked_at = time.perf_counter()
        self._next_talk, self._talked_step = step + 1, step

    def verdict(self, step: int) -> Verdict:
        """Return what to do before `step` (above the epoch's first)."""
        verdict: Verdict = "go on"
        if step >= self._next_talk:
            now = time.perf_counter()
            pace = (now - self._talked_at) / max(1, step - self._talked_step)
            stride = max(1, min(_MOST_STEPS, int(_TALK_S / max(pace, 1e-6))))
            verdict, stride = self._from_rank_zero(self._due(now), stride)
            self._talked_at, self._talked_step, self._next_talk = now, step, step + stride
        if verdict == "go on" and self._every_steps and step % self._every_steps == 0:
            verdict = "save"
        if verdict != "go on":
            self._saved_at = time.perf_counter()
        return verdict

    def leave_now(self) -> bool:
        """Return whether to leave between epochs."""
        return self._from_rank_zero(self._due(time.perf_counter()), 1)[0] == "leave"

    def _due(self, now: float) -> Verdict:
        if self._rank > 0:
            return "go on"  # overwritten by rank 0's
        if self._scores.pausing():
            return "leave"
        late = self._every_minutes is not None and now - self._saved_at > 60 * self._every_minutes
        return "save" if late else "go on"

    def _from_rank_zero(self, verdict: Verdict, stride: int) -> tuple[Verdict, int]:
        if self._world_size == 1:
            return verdict, stride
        said = torch.tensor([_VERDICTS.index(verdict), stride], dtype=torch.int64, device=self._device)
        torch.distributed.broadcast(said, src=0)
        code, stride = said.tolist()
        return _VERDICTS[code], stride
