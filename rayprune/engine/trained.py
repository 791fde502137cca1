"""A trained network and its data, out of a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayprune.config import Config, make_config
from rayprune.engine.checkpoint import load_tensors, newest_checkpoint, read_position
from rayprune.engine.preparation import input_spec
from rayprune.engine.setup import InputSpec, build_network
from rayprune.overrides import read_yaml
from rayprune.sources import SampleSource, Splits, open_data


@dataclass(frozen=True)
class TrainedRun:
    """What a run has come to so far.

    Attributes:
        folder: of the run.
        config: its own.
        checkpoint: name of the newest one.
        epochs, steps: trained: whole epochs, and steps of the next one.
        network: with the checkpoint's weights, in eval mode on the device.
        input: what its inputs look like.
        held_out: training samples that it was not trained on (`data.hold_out`).
        validation: the source's own validation part.
        device: where the network is.
    """

    folder: Path
    config: Config
    checkpoint: str
    epochs: int
    steps: int
    network: nn.Module
    input: InputSpec
    held_out: SampleSource | None
    validation: SampleSource | None
    device: torch.device

    @property
    def trained(self) -> str:
        """How far it is trained, in words."""
        total = self.config.train.epochs
        if not self.steps:
            return f"after {self.epochs} of {total} epochs"
        return f"after {self.epochs} of {total} epochs and {self.steps} steps of the next"

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.epochs >= self.config.last_epoch


def open_run(folder: Path, device: torch.device) -> TrainedRun:
    """Open a run's network as its newest sound checkpoint has it, and the data that it was trained on.

    Raises:
        ValueError: no run, no checkpoint, or data or a network that are not the run's; one line with the cure.
    """
    config = _config_of(folder)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} holds no sound checkpoint yet: train it first, rayprune train {folder}/config.yaml")
    position, weights = _read(checkpoint, device)
    if position["digest"] != config.digest():
        raise ValueError(
            f"{folder}/config.yaml is not what its checkpoints were trained with (config {config.digest()}, they are "
            f"of {position['digest']}): restore it"
        )
    splits, validation = _data(config, folder, position)
    spec = input_spec(config, splits.train)
    network = build_network(config, spec, device)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the weights in {checkpoint} don't fit model {config.model.name!r} ({line}): bring back the code that it "
            "was trained with"
        ) from None
    return TrainedRun(
        folder=folder,
        config=config,
        checkpoint=checkpoint.name,
        epochs=int(position["epoch"]),
        steps=int(position["step"]),
        network=network.eval(),
        input=spec,
        held_out=None if config.data.hold_out is None else splits.validation,
        validation=validation,
        device=device,
    )


def find_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is the GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} can't be used: torch finds no GPU here, give --device cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:  # each backend has its own
        line = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(f"device {name!r} can't be used ({line}): give --device cpu, or cuda where there is") from None
    return device


def _config_of(folder: Path) -> Config:
    stored = folder / "config.yaml"
    if not stored.is_file():
        known = {
            "sweep.yaml": "a sweep: name one of its trials/",
            "compare.yaml": "a comparison: name one of its runs/",
        }
        what = next((text for name, text in known.items() if (folder / name).exists()), None)
        reason = f"is {what}" if what else "is no run folder (it has no config.yaml): name one, such as runs/NAME"
        raise ValueError(f"{folder} {reason}")
    try:
        return make_config(read_yaml(stored.read_text()) or {})
    except (OSError, ValueError) as error:
        raise ValueError(f"{stored} can't be read ({' '.join(str(error).split())}): restore it") from None


def _data(config: Config, folder: Path, position: Mapping[str, Any]) -> tuple[Splits, SampleSource | None]:
    """Return the run's parts, and the source's own validation part."""
    data = config.data
    keys: dict[str, Any] = {"limit": data.limit, "cache": data.cache, **data.source_keys}
    try:
        splits = open_data(data.source, hold_out=data.hold_out, **keys)
        validation = splits.validation if data.hold_out is None else open_data(data.source, **keys).validation
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"the data of {folder} can't be opened ({line}): bring it back, or say in {folder}/config.yaml where it is"
        ) from None
    ours, theirs = splits.train.fingerprint, position["fingerprint"]
    if ours != theirs:
        raise ValueError(
            f"{folder} was trained on other data (fingerprint {theirs[:12]}, here {ours[:12]}): bring that data back"
        )
    return splits, validation


def _read(checkpoint: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a checkpoint's position and weights."""
    try:
        return read_position(checkpoint), load_tensors(checkpoint / "model.pt", device)
    except FileNotFoundError:
        raise ValueError(f"{checkpoint} was just replaced by a newer one: the run is training, try again") from None
