"""The commands under test: a config, the moment to strike, and the processes that they run in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.scenarios.kills.driver import Driver, configuration

_EPOCHS = 4
_NUM_IMAGES, _SIDE = 4000, 160
IMAGES = "images"  # the folder of images, beside those of the cells


@dataclass(frozen=True)
class Command:
    """A command under test.

    Attributes:
        name: in the table.
        word: the command of `rayprune`.
        config: its config, from the folder of the whole campaign.
        is_due: whether the command is at work that a fault can disturb.
        processes: name → the beginning of the title, or the end of the first word, of each process.
    """

    name: str
    word: str
    config: Callable[[Path], dict[str, Any]]
    is_due: Callable[[Driver], bool]
    processes: dict[str, str]


_RAY = {"driver": "", "raylet": "raylet/raylet", "gcs": "gcs/gcs_server"}
_TRAIN = {
    **_RAY,
    "controller": "ray::TrainController",
    "worker": "ray::RayTrainWorker",
    "score_actor": "ray::ScoreActor",
    "split_coordinator": "ray::SplitCoordinator",
}
_TRIALS = {**_RAY, "trial": "ray::ResourceTrainable"}


def _train(_: Path) -> dict[str, Any]:
    return configuration(_EPOCHS)


def _in_process(**more: Any) -> dict[str, Any]:
    config = configuration(_EPOCHS, num_workers=0, stream="local")
    return {**config, "run": {"checkpoint_steps": 3}, **more}


def _sweep(_: Path) -> dict[str, Any]:
    return _in_process(sweep={"space": {"optim.lr": [0.02, 0.03]}, "max_concurrent": 2, "max_failures": 1})


def _compare(_: Path) -> dict[str, Any]:
    judged = {"seeds": 2, "baselines": [], "tune": False, "timed_seeds": 0, "parallel": 2}
    return _in_process(compare=judged)


def _cache(folder: Path) -> dict[str, Any]:
    images = folder / IMAGES
    if not images.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
        for number in range(_NUM_IMAGES):
            file = images / f"class-{number % 2}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(pixels, number, axis=0)).save(file)
    data = {"source": "image_folder", "path": str(images), "image_size": 16, "cache": "disk", "hold_out": 0.5}
    return {**_in_process(), "data": data, "model": {"name": "mlp"}, "train": {"epochs": 1, "batch_size": 256}}


def _has_trained(driver: Driver) -> bool:
    steps = driver.log.update()
    return bool(steps) and steps[-1].position >= (1, 3)


def _builds_cache(driver: Driver) -> bool:
    return any(driver.home.glob("cache/.decoded-*/*.npy"))


COMMANDS = {
    command.name: command
    for command in (
        Command("train", "train", _train, _has_trained, _TRAIN),
        Command("sweep", "sweep", _sweep, _has_trained, _TRIALS),
        Command("compare", "compare", _compare, _has_trained, _TRIALS),
        Command("cache build", "train", _cache, _builds_cache, {"driver": ""}),
    )
}
