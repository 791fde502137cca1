"""Learning-rate schedules that count steps, in epochs whose number of steps changes.

A schedule is built for T steps, those of the run without pruning. After each optimizer step it advances as far as the
progress of the run: by one step without pruning, by more if the epoch is shorter. So it is at its end when the run is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class StepPacer:
    """Tell how many steps a schedule must advance after an optimizer step.

    Args:
        run: the planned run.

    >>> class Run:
    ...     progress, num_full_updates = 0.0, 10
    >>> pacer = StepPacer(Run())
    >>> Run.progress = 0.25
    >>> pacer.steps()
    2
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._position = self._target()

    def _target(self) -> int:
        return int(self._run.progress * self._run.num_full_updates + 1e-6)

    def steps(self) -> int:
        """Return the steps since the last call."""
        target = self._target()
        steps, self._position = target - self._position, target
        return max(0, steps)


def scale_learning_rates(optimizer: torch.optim.Optimizer, scale: Callable[[], float]) -> None:
    """Multiply all learning rates by `scale()` during each step of an optimizer, for methods that ask for it."""
    saved: list[Any] = []

    def before(*_: Any) -> None:
        factor = scale()
        if factor != 1.0 and not saved:  # a subclass's step calls its base's, which has the hooks as well
            saved[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def after(*_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, saved, strict=False):
            group["lr"] = rate
        saved.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
