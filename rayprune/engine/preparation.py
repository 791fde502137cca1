"""What a run checks and writes before anything starts: the input, the model, the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from rayprune.config import Config
from rayprune.core.objects import closest
from rayprune.engine.checkpoint import checkpoint_path, damage, newest_checkpoint, read_position
from rayprune.engine.resources import Resources
from rayprune.engine.run_folder import append_metrics, mend_metrics, read_metrics, write_environment
from rayprune.engine.setup import InputSpec
from rayprune.nn.augment import Augment
from rayprune.nn.models import build_model
from rayprune.sources import SampleSource, default_augment, input_statistics


def input_spec(config: Config, source: SampleSource) -> InputSpec:
    """Return what the network sees: shape, classes, augmentation with the statistics of the training split."""
    schema = source.schema
    shape = schema.columns[schema.input].shape
    mean, std = input_statistics(source)
    keys = default_augment(config.data.source) if config.data.augment == "auto" else dict(config.data.augment)
    valid = ("crop", "flip")
    for key in keys:
        if key not in valid:
            raise ValueError(f"unknown key 'data.augment.{key}': {closest(key, valid)}")
    if len(shape) == 3:
        height, width, channels = shape
        shape = (channels, height, width)
    augment = Augment(**keys, mean=mean, std=std)
    return InputSpec(schema.input, tuple(shape), schema.num_classes, augment)


def check_model(config: Config, spec: InputSpec) -> None:
    """Build the network once on this machine: a wrong name or shape shows before anything starts."""
    model = build_model(config.model.name, num_classes=spec.num_classes, input_shape=spec.shape, **config.model.options)
    with torch.no_grad():
        logits = model.eval()(torch.zeros(2, *spec.shape))
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, spec.num_classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model {config.model.name!r} returns {got} for a batch of 2, not (2, {spec.num_classes})")


def open_folder(config: Config, source: SampleSource, resources: Resources) -> tuple[Path, int]:
    """Create the run folder, or check that the one that is there is this run's.

    Returns:
        The folder, and where its newest sound checkpoint stands: 0 without one, E when the run is finished.

    Raises:
        ValueError: the folder is another run's, or can't be written; nothing in it was touched.
    """
    if config.run.name is None:
        raise ValueError("run.name is not set: name the run's folder")
    folder = Path(config.run.storage_path).expanduser().resolve() / config.run.name
    stored = folder / "config.yaml"
    if stored.exists():
        if config.run.resume == "never":
            raise ValueError(
                f"{folder} holds a run already: choose another run.name, or run.resume=auto to go on with it"
            )
        _check_same(config, Config.model_validate(yaml.safe_load(stored.read_text())), folder)
    origin = None
    if config.run.resume not in {"auto", "never"} and newest_checkpoint(folder) is None:
        origin = _sound_origin(Path(config.run.resume).expanduser().resolve(), config, source.fingerprint)
    start_epoch = _first_epoch(folder, source.fingerprint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stored.write_text(config.to_yaml())
        if origin is not None:
            _adopt(folder, origin)
            start_epoch = _first_epoch(folder, source.fingerprint)
    except OSError as error:
        raise ValueError(f"run folder {folder} can't be written: {error.strerror}; set run.storage_path") from None
    write_environment(
        folder,
        seed=config.train.seed,
        fingerprint=source.fingerprint,
        num_workers=resources.num_workers,
        threads=resources.threads,
        stream=resources.stream,
        gpu=torch.cuda.get_device_name() if resources.use_gpu and torch.cuda.is_available() else None,
        cuda=torch.version.cuda if resources.use_gpu else None,
    )
    return folder, start_epoch


def _sound_origin(path: Path, config: Config, fingerprint: str) -> Path:
    """Return the checkpoint that `run.resume=PATH` means: the folder itself, or the newest of a run folder.

    Raises:
        ValueError: there is none, it is damaged, or it is of another configuration or data set.
    """
    is_checkpoint = (path / "position.json").exists()
    damaged = damage(path) if is_checkpoint else None
    origin = path if is_checkpoint and damaged is None else newest_checkpoint(path)
    if origin is None or damaged is not None:
        reason = f"is damaged ({damaged})" if damaged else "holds no sound checkpoint"
        raise ValueError(f"run.resume {path} {reason}: name a run folder or one of its checkpoints/epoch-… folders")
    position = read_position(origin)
    run_config = origin.parents[1] / "config.yaml"
    if position["digest"] != config.digest() and run_config.exists():
        _check_same(config, Config.model_validate(yaml.safe_load(run_config.read_text())), origin.parents[1])
    for name, own in (("digest", config.digest()), ("fingerprint", fingerprint)):
        if position[name] != own:
            raise ValueError(f"run.resume {origin} is of another run: {name} {position[name]}, here {own}")
    return origin


def _adopt(folder: Path, origin: Path) -> None:
    """Copy a checkpoint, and the metrics of the epochs before it, into a run folder of its own."""
    position = read_position(origin)
    copy = checkpoint_path(folder, position["epoch"], position["step"])
    partial = copy.with_name(f".partial-{copy.name}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(origin, partial)
    partial.rename(copy)
    for record in read_metrics(origin.parents[1]):
        if record["epoch"] < position["epoch"]:
            append_metrics(folder, record)


def _check_same(config: Config, stored: Config, folder: Path) -> None:
    if config.digest() == stored.digest():
        return
    new, old = (_flat(c.model_dump(mode="json", exclude={"scaling", "run"})) for c in (config, stored))
    changed = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]
    raise ValueError(f"{folder} holds another run ({'; '.join(changed)}): choose another run.name")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _first_epoch(folder: Path, fingerprint: str) -> int:
    newest = newest_checkpoint(folder)
    if newest is None:
        return 0
    position = read_position(newest)
    if position["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} was trained on other data (fingerprint {position['fingerprint'][:12]}, "
            f"here {fingerprint[:12]}): choose another run.name"
        )
    mend_metrics(folder, position["metrics"])
    return int(position["epoch"])
