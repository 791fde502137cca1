"""What a run checks and writes before anything starts: the input, the model, the run folder."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rayprune.config import Config, make_config
from rayprune.core.objects import closest
from rayprune.core.selector import Selector
from rayprune.engine.checkpoint import copy_checkpoint, damage, newest_checkpoint, read_position
from rayprune.engine.resources import Resources
from rayprune.engine.run_folder import append_metrics, mend_metrics, read_metrics, write_environment
from rayprune.engine.setup import InputSpec, build_step, network_optimizer, rate_at
from rayprune.engine.stream import shuffle_name
from rayprune.nn.augment import Augment
from rayprune.nn.models import build_model
from rayprune.nn.signals import check_signals, signal_floats
from rayprune.overrides import read_yaml
from rayprune.sources import SampleSource, default_augment, input_statistics

# Up to here a batch that is mostly padding costs little: a first try on a few samples need not change it.
_SMALL_BATCH = 4_096
# Enough for a method to show what it refuses, few enough to cost nothing.
_TRIAL_SAMPLES = 1_000


def input_spec(config: Config, source: SampleSource) -> InputSpec:
    """Return what the network sees: shape, classes, augmentation with the statistics of the training split."""
    schema = source.schema
    assert schema.num_classes is not None, "open_data lets labelled samples through only"
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


def check_sizes(config: Config, num_samples: int) -> None:
    """Refuse a batch that the training split cannot fill."""
    batch = config.train.batch_size
    if config.train.last_batch == "drop" and batch > num_samples:
        raise ValueError(
            f"train.batch_size {batch} is more than the {num_samples} training samples, and train.last_batch is drop: "
            "use train.last_batch=pad or a smaller train.batch_size"
        )
    if batch >= 2 * num_samples and batch > _SMALL_BATCH:
        raise ValueError(
            f"train.batch_size {batch} would be mostly padding with {num_samples} training samples: use at most "
            f"train.batch_size={num_samples}"
        )


def check_method(config: Config, source: SampleSource) -> None:
    """Try the method's first selection on a few samples: what it refuses shows before anything starts."""
    method = config.build_method()
    check_signals(method.signals)
    few = min(len(source), _TRIAL_SAMPLES)
    labels = source.labels[:few] if method.class_floor > 0 else None
    with contextlib.suppress(RuntimeError):  # so few samples may leave nothing to keep; all of them may not
        Selector(method, few, config.train.epochs, config.train.seed, labels=labels).begin_epoch(0)


def unkept_signals(config: Config, spec: InputSpec, num_samples: int) -> list[str]:
    """Return a line for each signal that workers do not keep, with its size: what a lost ScoreActor costs."""
    lines = []
    for name in config.build_method().signals:
        floats = signal_floats(name, spec.num_classes)
        if floats > 1 and config.scaling.num_workers != 0:
            size = num_samples * floats * 4 / 2**20
            lines.append(
                f"workers keep no copy of the signal {name} ({floats} numbers a sample, {size:,.1f} MiB for all): if "
                "the ScoreActor dies, the run goes back to its last checkpoint"
            )
    return lines


def check_model(config: Config, spec: InputSpec) -> None:
    """Build network, optimiser, rates and train step once on this machine: a mistake shows before anything starts."""
    name = config.model.name
    model = build_model(name, num_classes=spec.num_classes, input_shape=spec.shape, **config.model.options)
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *spec.shape))
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"model {name!r} can't take a batch of 2 × {spec.shape}: {type(error).__name__}: {line}"
        ) from error
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (2, spec.num_classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"model {name!r} returns {got} for a batch of 2, not (2, {spec.num_classes})")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model {name!r} has no parameters to train")
    try:
        network_optimizer(config, model)
        for epoch in {0, config.train.epochs - 1}:
            rate_at(config, epoch, 0, 1, 1.0)
    except ValueError as error:
        raise ValueError(f"optim can't be used: {error}") from None
    _check_step(config, model, spec)


def _check_step(config: Config, model: torch.nn.Module, spec: InputSpec) -> None:
    """Send a batch of zeros through each part of the method's train step."""
    method = config.build_method()
    asked = tuple(dict.fromkeys((*method.signals, *getattr(method, "sweep_signals", ()))))
    try:
        step = build_step(config, model, method.signals, spec, 1, torch.device("cpu"))
        zeros, targets = torch.zeros(2, *spec.shape), torch.zeros(2, dtype=torch.int64)
        for part in step.parts:
            step.evaluate(zeros, targets, smoothed=True, signals=asked, part=part)
    except ValueError as error:
        raise ValueError(f"method {method.name!r} can't train model {config.model.name!r}: {error}") from None


@contextlib.contextmanager
def open_folder(config: Config, source: SampleSource, resources: Resources) -> Iterator[tuple[Path, int]]:
    """Create the run folder, or check that the one that is there is this run's, and hold it while the block runs.

    Yields:
        The folder, and where its newest sound checkpoint stands: 0 without one, E when the run is finished.

    Raises:
        ValueError: the folder is another run's, in use by another process, or can't be written; nothing was touched.
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
        _check_same(config, _read_config(stored), folder)
    origin = None
    if config.run.resume not in {"auto", "never"} and newest_checkpoint(folder) is None:
        origin = _sound_origin(Path(config.run.resume).expanduser().resolve(), config, source)
    _sound_position(folder, config, source)
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(_sole_use(folder))
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "metrics.jsonl").open("a").close()
            partial = stored.with_suffix(".partial")  # a full disk or a kill must not leave half a config behind
            partial.write_text(config.to_yaml())
            partial.replace(stored)
            if origin is not None:
                _adopt(folder, origin)
            position = _sound_position(folder, config, source)
            if position is not None:
                mend_metrics(folder, position["metrics"])
            _describe(folder, config, source, resources)
        except OSError as error:
            what = f"{error.filename or folder}: {error.strerror}"
            raise ValueError(f"run folder {folder} can't be written ({what}): set run.storage_path") from None
        yield folder, position["epoch"] if position is not None else 0


@contextlib.contextmanager
def _sole_use(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets it go when the process ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {folder}: wait for it, or choose another run.name"
            ) from None
        yield


def _describe(folder: Path, config: Config, source: SampleSource, resources: Resources) -> None:
    on_gpu = resources.use_gpu and torch.cuda.is_available()
    write_environment(
        folder,
        seed=config.train.seed,
        fingerprint=source.fingerprint,
        num_workers=resources.num_workers,
        threads=resources.threads,
        stream=resources.stream,
        gpu=torch.cuda.get_device_name() if on_gpu else None,
        cuda=torch.version.cuda if on_gpu else None,
    )


def _read_config(stored: Path) -> Config:
    try:
        return make_config(read_yaml(stored.read_text()) or {})
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{stored} can't be read ({line}): restore it or choose another run.name") from None


def _sound_origin(path: Path, config: Config, source: SampleSource) -> Path:
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
        _check_same(config, _read_config(run_config), origin.parents[1])
    for name, own in (("digest", config.digest()), ("fingerprint", source.fingerprint)):
        if position[name] != own:
            raise ValueError(f"run.resume {origin} is of another run: {name} {position[name]}, here {own}")
    _check_shuffle(origin, position, source)
    return origin


def _adopt(folder: Path, origin: Path) -> None:
    """Copy a checkpoint, and the metrics of the epochs before it, into a run folder of its own."""
    position = read_position(copy_checkpoint(origin, folder))
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


def _sound_position(folder: Path, config: Config, source: SampleSource) -> dict[str, Any] | None:
    """Return the newest sound checkpoint's position, None without one; refuse another run's."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return None
    position = read_position(newest)
    fingerprint = source.fingerprint
    if position["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} was trained on other data (fingerprint {position['fingerprint'][:12]}, "
            f"here {fingerprint[:12]}): choose another run.name"
        )
    if position["digest"] != config.digest():
        raise ValueError(
            f"{folder} holds another run (its checkpoints are of config {position['digest']}, this is "
            f"{config.digest()}): choose another run.name"
        )
    _check_shuffle(newest, position, source)
    return position


def _check_shuffle(checkpoint: Path, position: Mapping[str, Any], source: SampleSource) -> None:
    """Refuse to go on in another order: inside an epoch, samples would be visited twice and others never."""
    before, now = position.get("shuffle", ""), shuffle_name(source)  # older versions shuffled uniformly
    if before != now:
        ways = ["in windows of row groups" if name else "uniformly" for name in (before, now)]
        cure = "set data.cache=none" if before and not now else "set data.cache=disk" if now and not before else ""
        raise ValueError(
            f"checkpoint {checkpoint} is of a run shuffled {ways[0]}, this one would be {ways[1]}"
            + (f": {cure}" if cure else ", of other groups: choose another run.name")
        )
