"""Several runs at a time, each in an actor of its own: whatever comes first, the others are told to save and leave."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from rayprune.config import Config, make_config
from rayprune.engine.ending import one_line
from rayprune.engine.run import TrainingFailed
from rayprune.engine.shares import Share
from rayprune.engine.train import train
from rayprune.overrides import read_yaml

# How long a run that was told to stop may take to save.
_LEAVE_S = 60.0


class _Trainer:
    """The actor: one run at a time, and a pause that comes in beside it."""

    def __init__(self, folder: str) -> None:
        os.chdir(folder)  # relative paths of a config are the driver's
        self._pause = threading.Event()

    def train(self, config_yaml: str) -> str | None:
        """Run a config to its end; return what ended it otherwise, in one line."""
        try:
            train(make_config(read_yaml(config_yaml)), on_notice=lambda line: None, pause=self._pause)
        except Exception as error:
            return one_line(error)
        return None

    def pause(self) -> None:
        """Let the run save and leave."""
        self._pause.set()


def train_side_by_side(configs: Sequence[Config], share: Share, on_start: Callable[[int], None]) -> None:
    """Train several runs, as many at a time as have room; Ray is connected.

    Args:
        configs: of the runs, each with a folder of its own.
        share: how many at a time, and what Ray reserves for each.
        on_start: called with the number of each run that begins.

    Raises:
        TrainingFailed: a run broke down; the others have saved and left.
        KeyboardInterrupt: SIGINT came; likewise.
    """
    reserved = {"num_cpus": share.reserved.get("CPU", 0.0), "num_gpus": share.reserved.get("GPU", 0.0)}
    make = ray.remote(_Trainer).options(max_concurrency=2, **reserved)  # type: ignore[attr-defined]
    actors: list[Any] = [make.remote(str(Path.cwd())) for _ in range(min(share.num_concurrent, len(configs)))]
    idle = list(actors)
    running: dict[Any, tuple[Any, Config]] = {}
    left = list(enumerate(configs))
    try:
        while left or running:
            while left and idle:
                (number, config), actor = left.pop(0), idle.pop()
                on_start(number)
                running[actor.train.remote(config.to_yaml())] = (actor, config)
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            actor, config = running.pop(done)
            _raise_for(done, str(config.run.name))
            idle.append(actor)
    finally:
        _end(actors, list(running))


def _raise_for(done: Any, name: str) -> None:
    try:
        problem = ray.get(done)
    except RayError as error:
        problem = f"its process ended ({one_line(error)})"
    if problem is not None:
        raise TrainingFailed(f"run {name}: {problem}")


def _end(actors: Sequence[Any], running: list[Any]) -> None:
    """Let what still runs save and leave, then end the processes."""
    if running:
        for actor in actors:
            actor.pause.remote()
        ray.wait(running, num_returns=len(running), timeout=_LEAVE_S)
    for actor in actors:
        ray.kill(actor)
