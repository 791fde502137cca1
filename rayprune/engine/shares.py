"""How many runs go at once and what each gets, settled before Ray would wait for resources without a word."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rayprune.config import Config
from rayprune.engine.resources import resolve_resources
from rayprune.sources import SampleSource

# The actor of a trial with workers only waits for them.
_WAITING_CPUS = 0.1
_LEAST_CPUS = 0.25


@dataclass(frozen=True)
class Share:
    """What each run gets.

    Attributes:
        num_concurrent: runs that go at once.
        reserved: what Ray reserves for a run's own actor.
        scaling: the keys of `scaling` that its config gets.
        text: the same for a person.
    """

    num_concurrent: int
    reserved: dict[str, float]
    scaling: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Asked:
    """Who asks for how many runs at once, for messages that name the key.

    Attributes:
        value: a number, or "auto".
        key: where it was asked.
        noun: what a run is called there.
    """

    value: int | Literal["auto"]
    key: str = "sweep.max_concurrent"
    noun: str = "trial"


def share_resources(
    config: Config, source: SampleSource, num_runs: int, asked: Asked, total: Mapping[str, float]
) -> Share:
    """Settle how many runs go at once.

    Args:
        config: of the runs.
        source: of the training data.
        num_runs: runs to make.
        asked: how many at once, and who says so.
        total: the resources that there are, as Ray counts them.

    Raises:
        ValueError: no run can have what the config asks for, or not so many at once; with the cure.
    """
    if isinstance(config.scaling.num_workers, tuple):
        fewest = config.scaling.num_workers[0]
        raise ValueError(f"{asked.noun}s at once need a fixed number of workers: set scaling.num_workers={fewest}")
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    if config.scaling.num_workers == 0:
        return _in_process(config, num_runs, asked, cpus, gpus)
    return _with_workers(config, source, num_runs, asked, cpus, gpus)


def _in_process(config: Config, num_runs: int, asked: Asked, cpus: float, gpus: float) -> Share:
    scaling = config.scaling
    use_gpu = gpus >= 1 if scaling.use_gpu == "auto" else scaling.use_gpu
    threads = 1 if scaling.threads == "auto" else scaling.threads
    _check(asked, threads, cpus, "threads", f"scaling.threads={max(1, int(cpus))}")
    if use_gpu:
        _check(asked, 1, gpus, "GPU", "scaling.use_gpu=false")
    most = int(min(cpus // threads, gpus if use_gpu else math.inf))
    concurrent = _concurrent(asked, most, num_runs)
    if scaling.threads == "auto":
        threads = max(1, int(cpus // concurrent))
    reserved = {"CPU": float(threads), **({"GPU": 1.0} if use_gpu else {})}
    text = f"{concurrent} at once, {threads} thread{'s' if threads > 1 else ''} each" + (", a GPU each" * use_gpu)
    stream = "device" if scaling.stream == "device" else "local"
    return Share(concurrent, reserved, {"threads": threads, "use_gpu": use_gpu, "stream": stream}, text)


def _with_workers(config: Config, source: SampleSource, num_runs: int, asked: Asked, cpus: float, gpus: float) -> Share:
    scaling = config.scaling
    workers = scaling.num_workers
    assert isinstance(workers, int)
    alone = resolve_resources(config, source)
    beside = _WAITING_CPUS + (1.0 if alone.stream == "ray" and cpus > 1 else 0.0)  # the actor, and Ray Data
    largest = math.floor((cpus - beside) / workers * 100) / 100
    each = float(scaling.cpus_per_worker) if scaling.cpus_per_worker != "auto" else min(1.0, largest)
    if each > largest or each < _LEAST_CPUS:
        cure = f"scaling.cpus_per_worker={largest:g}" if largest >= _LEAST_CPUS else "scaling.num_workers=0"
        raise ValueError(
            f"no {asked.noun} can have its {workers} workers × {max(each, _LEAST_CPUS):g} CPUs + {beside:g} CPUs "
            f"beside them: the cluster has {cpus:g}, Ray would wait for ever: set {cure}"
        )
    most = int(cpus // (workers * each + beside))
    if alone.use_gpu:
        most = min(most, int(gpus // workers))
    concurrent = _concurrent(asked, most, num_runs)
    if scaling.cpus_per_worker == "auto":
        each = math.floor((cpus / concurrent - beside) / workers * 100) / 100
        each = float(int(each)) if each >= 1 else each
    threads = max(1, int(cpus // (workers * concurrent))) if scaling.threads == "auto" else scaling.threads
    settled = {"threads": threads, "use_gpu": alone.use_gpu, "stream": alone.stream, "cpus_per_worker": each}
    text = f"{concurrent} at once, {workers} worker{'s' if workers > 1 else ''} of {each:g} CPUs each"
    return Share(concurrent, {"CPU": _WAITING_CPUS}, settled, text)


def _check(asked: Asked, needed: float, there: float, what: str, cure: str) -> None:
    if needed > there:
        raise ValueError(
            f"no {asked.noun} can have {needed:g} {what}: the cluster has {there:g}, Ray would wait for ever: "
            f"set {cure}"
        )


def _concurrent(asked: Asked, most: int, num_runs: int) -> int:
    if asked.value == "auto":
        return max(1, min(most, num_runs))
    if asked.value > most:
        raise ValueError(
            f"{asked.key} {asked.value} is more than there is room for ({most} at a time): set {asked.key}={most}"
        )
    return asked.value
