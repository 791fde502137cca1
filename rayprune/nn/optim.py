"""Optimizers, and learning rates as pure functions of the fraction of training done.

A learning rate depends on progress alone, so it has no state of its own: after a resume, or when pruning has shortened
an epoch, the fraction done is enough. The config has checked every value.

`onecycle` follows Smith and Topin (arXiv 1708.07120) as torch.optim.lr_scheduler.OneCycleLR does with its defaults,
except that momentum is not cycled. For T steps, torch puts the peak at step pct_start·T − 1, which is the fraction
(pct_start·T − 1)/(T − 1) of training; here it is at pct_start exactly, the limit of many steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from rayprune.errors import ConfigError, UsageError

# OneCycleLR's defaults.
PCT_START, DIV_FACTOR, FINAL_DIV_FACTOR = 0.3, 25.0, 1e4


def build_optimizer(
    name: str,
    module: nn.Module,
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    is_trial: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimizer "sgd" or "adamw" of a module's parameters.

    Weight decay, decoupled for AdamW, acts on every parameter, biases and norms too, as in the published recipes.
    A trial does not import torch's compiler, as the first optimizer of a process otherwise does; that takes a second.
    """
    kind: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    options: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov} if name == "sgd" else {"betas": betas}
    if is_trial:
        # torch wraps the method in a function that excludes it from compilation.
        unwrapped = inspect.unwrap(torch.optim.Optimizer.add_param_group)
        kind = type(kind.__name__, (kind,), {"add_param_group": unwrapped})
    optimizer: torch.optim.Optimizer = kind(module.parameters(), lr=lr, weight_decay=weight_decay, **options)
    return optimizer


class ProgressLR(LRScheduler):
    """Set every group's learning rate to its initial rate times a function of the fraction of training done.

    Args:
        optimizer: any optimizer; its present rates are the initial ones.
        fn: progress in [0, 1] → factor.

    Attributes:
        progress: as passed to the last `step`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fn: Callable[[float], float]) -> None:
        self._fn, self.progress, self._scale = fn, 0.0, 1.0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of every group."""
        factor = self._fn(self.progress) * self._scale
        return [rate * factor for rate in self.base_lrs]

    def step(self, progress: float | None = None, scale: float = 1.0) -> None:
        """Set the rates of the next step.

        Args:
            progress: `shard.progress`, in [0, 1].
            scale: a further factor, such as `epoch.lr_scale`.

        Raises:
            UsageError: progress is missing, as where another library calls the scheduler.
            ConfigError: progress is not in [0, 1].
        """
        if progress is None:
            if hasattr(self, "_last_lr"):
                raise UsageError("progress_lr needs the progress: call step(shard.progress) after optimizer.step()")
            progress = self.progress  # the first call, in LRScheduler.__init__
        if not 0.0 <= progress <= 1.0:
            raise ConfigError(f"progress {progress!r} must be in [0, 1]: give step(shard.progress)")
        self.progress, self._scale = float(progress), scale
        # LRScheduler's own step counts calls and warns of their order, which does not matter here.
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the function, which may not pickle."""
        return {name: value for name, value in super().state_dict().items() if name != "_fn"}


def progress_lr(optimizer: torch.optim.Optimizer, fn: Callable[[float], float]) -> ProgressLR:
    """Schedule the learning rate by the fraction of training done, which fits epochs of any length.

    Pruning changes the number of steps of an epoch, so a schedule over epochs × steps would not reach its end.

    Args:
        optimizer: any optimizer; its present rates are the initial ones.
        fn: progress in [0, 1] → the factor on the initial rate, such as `lambda t: 0.5 * (1 + math.cos(math.pi * t))`.

    Returns:
        The scheduler. Call `step(shard.progress)` after `optimizer.step()`, and once after loading a state.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    >>> scheduler = progress_lr(optimizer, lambda t: 1 - t)
    >>> scheduler.step(0.75)
    >>> scheduler.get_last_lr()
    [0.025]
    """
    return ProgressLR(optimizer, fn)


def learning_rate(schedule: str, progress: float, *, peak: float, warmup: float = 0.0, **options: Any) -> float:
    """Return the learning rate at a point of training.

    Args:
        schedule: a key of LR_SCHEDULES.
        progress: fraction of training done, in [0, 1].
        peak: the largest rate.
        warmup: fraction of training, in [0, 1), over which the rate first rises linearly from 0; 0 for onecycle,
            which has a warm-up of its own.
        **options: of the schedule: `step` takes milestones and gamma.

    >>> [round(learning_rate("cosine", t, peak=0.1), 6) for t in (0.0, 0.5, 1.0)]
    [0.1, 0.05, 0.0]
    >>> learning_rate("constant", 0.05, peak=0.1, warmup=0.1)
    0.05
    """
    assert 0.0 <= progress <= 1.0
    if progress < warmup:
        return peak * (progress / warmup)
    return peak * LR_SCHEDULES[schedule](progress, warmup, **options)


def constant(progress: float, warmup: float) -> float:
    """Stay at the peak.

    >>> constant(0.7, 0.0)
    1.0
    """
    return 1.0


def cosine(progress: float, warmup: float) -> float:
    """Fall from the peak at the end of the warm-up to 0 along half a cosine (Loshchilov, Hutter, arXiv 1608.03983).

    >>> cosine(0.625, 0.25)
    0.5
    """
    return _anneal(1.0, 0.0, (progress - warmup) / (1.0 - warmup))


def step(progress: float, warmup: float, *, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Multiply by gamma at each milestone, a fraction of the whole training.

    >>> [step(t, 0.0, milestones=(0.5, 0.75), gamma=0.5) for t in (0.49, 0.5, 1.0)]
    [1.0, 0.5, 0.25]
    """
    return float(gamma ** sum(progress >= milestone for milestone in milestones))


def onecycle(progress: float, warmup: float) -> float:
    """Rise from 1/DIV_FACTOR to the peak at PCT_START, fall to 1/(DIV_FACTOR·FINAL_DIV_FACTOR), along cosines.

    >>> [round(onecycle(t, 0.0), 6) for t in (0.0, 0.3, 1.0)]
    [0.04, 1.0, 4e-06]
    """
    first = 1.0 / DIV_FACTOR
    if progress < PCT_START:
        return _anneal(first, 1.0, progress / PCT_START)
    return _anneal(1.0, first / FINAL_DIV_FACTOR, (progress - PCT_START) / (1.0 - PCT_START))


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * fraction))


# Progress and the warm-up's end → the fraction of the peak rate.
LR_SCHEDULES: dict[str, Callable[..., float]] = {
    "constant": constant,
    "cosine": cosine,
    "onecycle": onecycle,
    "step": step,
}
