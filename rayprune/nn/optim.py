"""Optimisers, and learning rates as pure functions of the fraction of training done.

A learning rate depends on progress alone, so that it needs no state of its own: after a resume, or when pruning has
shortened an epoch, the fraction done says it all.

`onecycle` follows Smith and Topin (arXiv 1708.07120) as torch.optim.lr_scheduler.OneCycleLR does with its defaults,
except that momentum is not cycled. Torch puts the peak of T steps at step pct_start·T − 1, which is the fraction
(pct_start·T − 1)/(T − 1) of its course; here it is at pct_start exactly, the limit of many steps.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rayprune.core.references import closest
from rayprune.errors import ConfigError

OPTIMIZERS = ("adamw", "sgd")

# progress after the warm-up and the warm-up's end -> the share of the peak rate
LRSchedule = Callable[..., float]
LR_SCHEDULES: dict[str, LRSchedule] = {}


def build_optimizer(
    name: str,
    params: nn.Module | Iterable[Any],
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """Build an optimiser; weight decay acts on every parameter, biases and norms too, as the published recipes do.

    Args:
        name: "sgd" or "adamw".
        params: a module, parameters, or parameter groups.
        lr: peak learning rate, above 0.
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0; decoupled for adamw.
        nesterov: of SGD; needs momentum.
        betas: of AdamW, each in [0, 1).

    Raises:
        ConfigError: an unknown name, or a value outside its range.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"unknown optimizer {name!r}: {closest(name, OPTIMIZERS)}")
    if not (lr > 0.0 and math.isfinite(lr)):
        raise ConfigError(f"lr must be above 0, got {lr}")
    if not (weight_decay >= 0.0 and math.isfinite(weight_decay)):
        raise ConfigError(f"weight_decay must be at least 0, got {weight_decay}")
    parameters = params.parameters() if isinstance(params, nn.Module) else params
    if name == "adamw":
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ConfigError(f"betas must be in [0, 1), got {betas}")
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    if not 0.0 <= momentum < 1.0:
        raise ConfigError(f"momentum must be in [0, 1), got {momentum}")
    if nesterov and momentum == 0.0:
        raise ConfigError("nesterov needs a momentum above 0, got 0.0")
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov)


def register_lr_schedule(function: LRSchedule) -> LRSchedule:
    """Add a schedule to LR_SCHEDULES under its function's name."""
    LR_SCHEDULES[function.__name__] = function
    return function


def learning_rate(schedule: str, progress: float, *, peak: float, warmup: float = 0.0, **shape: Any) -> float:
    """Give the learning rate at a point of training.

    Args:
        schedule: a key of LR_SCHEDULES.
        progress: fraction of training done, in [0, 1].
        peak: the largest rate.
        warmup: fraction of training, in [0, 1), over which the rate first rises linearly from 0; 0 for onecycle,
            which has its own.
        **shape: the schedule's own keywords: `step` takes milestones and gamma; `onecycle` takes pct_start,
            div_factor and final_div_factor.

    Raises:
        ConfigError: an unknown schedule or keyword, or a value outside its range.

    >>> [round(learning_rate("cosine", t, peak=0.1), 6) for t in (0.0, 0.5, 1.0)]
    [0.1, 0.05, 0.0]
    >>> learning_rate("constant", 0.05, peak=0.1, warmup=0.1)
    0.05
    >>> learning_rate("cosine", 1.5, peak=0.1)
    Traceback (most recent call last):
    rayprune.errors.ConfigError: progress must be in [0, 1], got 1.5
    """
    if schedule not in LR_SCHEDULES:
        raise ConfigError(f"unknown learning-rate schedule {schedule!r}: {closest(schedule, LR_SCHEDULES)}")
    if not 0.0 <= progress <= 1.0:
        raise ConfigError(f"progress must be in [0, 1], got {progress}")
    if not 0.0 <= warmup < 1.0:
        raise ConfigError(f"warmup must be in [0, 1), got {warmup}")
    if schedule == "onecycle" and warmup > 0.0:
        raise ConfigError(f"schedule 'onecycle' warms up by itself (pct_start): warmup must be 0, got {warmup}")
    rule = LR_SCHEDULES[schedule]
    valid = [name for name, p in inspect.signature(rule).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in shape:
        if name not in valid:
            raise ConfigError(f"schedule {schedule!r} has no {name!r}: {closest(name, valid)}")
    # Outside the branch below, so that a wrong shape is refused at the first step and not after the warm-up.
    factor = rule(max(progress, warmup), warmup, **shape)
    return peak * (progress / warmup) if progress < warmup else peak * factor


@register_lr_schedule
def constant(progress: float, warmup: float) -> float:
    """Stay at the peak.

    >>> constant(0.7, 0.0)
    1.0
    """
    return 1.0


@register_lr_schedule
def cosine(progress: float, warmup: float) -> float:
    """Fall from the peak at the end of the warm-up to 0 along half a cosine (Loshchilov, Hutter, arXiv 1608.03983).

    >>> cosine(0.625, 0.25)
    0.5
    """
    return _anneal(1.0, 0.0, (progress - warmup) / (1.0 - warmup))


@register_lr_schedule
def step(progress: float, warmup: float, *, milestones: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> float:
    """Multiply by gamma at each milestone, a fraction of all training.

    >>> [step(t, 0.0, milestones=(0.5, 0.75), gamma=0.5) for t in (0.49, 0.5, 1.0)]
    [1.0, 0.5, 0.25]
    """
    if not all(0.0 <= milestone <= 1.0 for milestone in milestones):
        raise ConfigError(f"milestones must be fractions of training in [0, 1], got {tuple(milestones)}")
    if not 0.0 < gamma <= 1.0:
        raise ConfigError(f"gamma must be in (0, 1], got {gamma}")
    return float(gamma ** sum(progress >= milestone for milestone in milestones))


@register_lr_schedule
def onecycle(
    progress: float,
    warmup: float,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> float:
    """Rise from 1/div_factor to the peak at pct_start, fall to 1/(div_factor·final_div_factor), along cosines.

    >>> [round(onecycle(t, 0.0), 6) for t in (0.0, 0.3, 1.0)]
    [0.04, 1.0, 4e-06]
    """
    if not 0.0 < pct_start < 1.0:
        raise ConfigError(f"pct_start must be in (0, 1), got {pct_start}")
    if not (div_factor >= 1.0 and final_div_factor >= 1.0):
        raise ConfigError(f"div_factor and final_div_factor must be at least 1, got {div_factor}, {final_div_factor}")
    first = 1.0 / div_factor
    if progress < pct_start:
        return _anneal(first, 1.0, progress / pct_start)
    return _anneal(1.0, first / final_div_factor, (progress - pct_start) / (1.0 - pct_start))


def _anneal(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * fraction))
