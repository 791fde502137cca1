"""Checks before anything starts: inputs, sizes, method, memory, model and train step."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import numpy as np
import psutil
import torch

from rayprune.config import Config
from rayprune.core.selector import Selector
from rayprune.core.validation import plain
from rayprune.core.vectors import VectorColumn, check_disk
from rayprune.engine.train.build import (
    InputSpec,
    StepSettings,
    build_step,
    in_batch_method,
    model_exits,
    network_optimizer,
    new_model,
    rate_at,
    read_column,
    recorded_signals,
)
from rayprune.errors import ConfigError, RaypruneError, one_line
from rayprune.methods import Method
from rayprune.methods.fixed import Fixed
from rayprune.nn.augment import Augment, channels_first
from rayprune.nn.early_exit import num_exits_of
from rayprune.nn.flops import num_macs
from rayprune.nn.signals import signal_floats
from rayprune.nn.steps.in_batch import InBatchStep
from rayprune.nn.steps.l2w import weight_range
from rayprune.sources import SampleSource, default_augment, input_statistics

_LARGE_MIB = 1024.0  # a checkpoint worth a notice
# Smaller batches may be mostly padding: it costs little, and a first try on a few samples works.
_SMALL_BATCH = 4_096
# Enough samples for a method to refuse its settings, few enough to cost nothing.
_TRIAL_SAMPLES = 1_000


def input_spec(config: Config, source: SampleSource) -> InputSpec:
    """Return the network's inputs, with the statistics of the training split."""
    schema = source.schema
    assert schema.num_classes is not None, "open_data returns labeled samples"
    shape = schema.columns[schema.input].shape
    mean, std = input_statistics(source)
    keys = default_augment(config.data.source) if config.data.augment == "auto" else dict(config.data.augment)
    augment = Augment(**{key: plain(value) for key, value in keys.items()}, mean=mean, std=std)
    shape = augment.output_shape(channels_first(shape))
    return InputSpec(schema.input, shape, schema.num_classes, augment, len(source))


def check_sizes(config: Config, num_samples: int, row_bytes: int = 0) -> None:
    """Refuse a batch size that the training split cannot fill, or a worker's share that memory cannot hold."""
    batch = config.train.batch_size
    if config.train.last_batch == "drop" and batch > num_samples:
        raise ConfigError(
            f"train.batch_size {batch} is more than the {num_samples} training samples, and train.last_batch is drop: "
            "use train.last_batch=pad or a smaller train.batch_size"
        )
    if batch >= 2 * num_samples and batch > _SMALL_BATCH:
        raise ConfigError(
            f"train.batch_size {batch} would be mostly padding with {num_samples} training samples: use at most "
            f"train.batch_size={num_samples}"
        )
    workers = _most_workers(config)
    share, free = batch * row_bytes / workers, psutil.virtual_memory().available
    if share > free:
        raise ConfigError(
            f"train.batch_size {batch} × {row_bytes / 1e6:.1f} MB a sample is {share / 1e9:.1f} GB a worker, and "
            f"{free / 1e9:.1f} GB of memory are free: use a smaller train.batch_size or data.image_size"
        )
    if config.train.step_name == "l2w" and batch < 2 * workers:
        raise ConfigError(
            f"train.batch_size {batch} cannot give each of {workers} worker(s) two halves for train.step l2w: use at "
            f"least train.batch_size={2 * workers}, better {8 * workers}"
        )


def check_method(config: Config, source: SampleSource, method: Method, num_epochs: int) -> None:
    """Refuse a method that cannot select from this source; its first selection is tried on a few samples."""
    if vectors := [name for name in config.train.record if signal_floats(name, 2) > 1]:
        raise ConfigError(
            f"train.record {vectors}: only signals of one number per sample can be recorded: leave these out"
        )
    num_dropped = len(source) % config.train.batch_size if config.train.last_batch == "drop" else 0
    if method.collect_epochs and num_dropped:
        raise ConfigError(
            f"train.last_batch=drop leaves out {num_dropped} of {len(source)} samples in each epoch, and method "
            f"{method.name!r} must see every sample in every scoring epoch: use train.last_batch=pad"
        )
    if isinstance(method, Fixed):
        return  # its file has been read and covers all samples
    if (picking := in_batch_method(method)) is not None:
        for column in picking.file_columns():
            file, _ = read_column(picking, column, len(source))
            if file.fingerprint not in (None, source.fingerprint):
                raise ConfigError(f"{file.path} has scores of other data than data.source: score these samples")
    num_tried = min(len(source), _TRIAL_SAMPLES)
    labels = source.labels[:num_tried] if method.class_floor > 0 or method.needs_labels else None
    with contextlib.suppress(RuntimeError):  # nothing may be left to keep of so few samples
        Selector(method, num_tried, num_epochs, config.train.seed, labels=labels).begin_epoch(0)


def check_memory(method: Method, num_classes: int, num_samples: int) -> None:
    """Refuse a score table that does not fit into this machine's free memory.

    Raises:
        ConfigError: names the table's size and the cure.
    """
    row_bytes = 0
    for spec in method.columns().values():
        if isinstance(spec, VectorColumn):  # on the disk
            continue
        dtype, shape = spec if isinstance(spec, tuple) else (spec, ())
        # A vector of unknown length has an entry per class.
        row_size = math.prod(num_classes if length is None else length for length in shape)
        row_bytes += np.dtype(dtype).itemsize * row_size
    needed, free = row_bytes * num_samples, psutil.virtual_memory().available
    if needed > free:
        cure = " (method.storage=float16 halves most of it)" if "storage" in method.to_config() else ""
        raise ConfigError(
            f"method {method.name!r} keeps {row_bytes:,} bytes for each of {num_samples:,} samples, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: use a machine with more memory{cure}"
        )


def check_model(config: Config, spec: InputSpec, method: Method) -> None:
    """Build network, optimizer and train step once on this machine, and try them on zeros."""
    name = config.model.name
    model = new_model(config, spec)
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(2, *spec.shape))
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"model {name!r} can't take a batch of 2 × {spec.shape} ({type(error).__name__}: {line}): use another "
            "model, or correct its code"
        ) from error
    _check_output(name, output, spec.num_classes)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"model {name!r} has no parameters to train: use another model")
    try:
        network_optimizer(config, model, is_trial=True)
        for epoch in {0, config.train.epochs - 1}:
            rate_at(config, epoch, 0, 1, 1.0)
    except ValueError as error:
        raise ConfigError(f"optim can't be used: {error}") from None
    _check_step(config, model, spec, method)


def _check_output(name: str, output: Any, num_classes: int) -> None:
    try:
        num_exits_of(output)
    except ValueError as error:
        raise ConfigError(f"model {name!r} can't be trained: {error}") from None
    first = output if isinstance(output, torch.Tensor) else output[0]
    if tuple(first.shape) != (2, num_classes):
        raise ConfigError(
            f"model {name!r} returns {tuple(first.shape)} for a batch of 2: it must return (2, {num_classes}), a "
            "logit for each class"
        )


def _check_step(config: Config, model: torch.nn.Module, spec: InputSpec, method: Method) -> None:
    """Send a batch of zeros through each part of the method's train step."""
    settings = StepSettings.of(method, config, recorded_signals(config, spec))
    try:
        if settings.name == "l2w":
            _check_halves(config, model, spec)
        _try_signals(config, model, spec, settings)
    except Exception as error:
        if settings.name == "embed":
            raise _embedder_error(config, spec, error) from error
        if not isinstance(error, ValueError):
            raise
        raise ConfigError(f"method {method.name!r} can't train model {config.model.name!r}: {error}") from None


def _embedder_error(config: Config, spec: InputSpec, error: Exception) -> Exception:
    """Return rayprune's own error as it is, and any other with the embedder's name."""
    if isinstance(error, RaypruneError):
        return error
    what = f"collect.embedder {config.collect.embedder!r}"
    return ConfigError(
        f"{what} can't take a batch of 2 × {spec.shape} ({type(error).__name__}: {one_line(error)}): use another "
        "network, or correct its code"
    )


def _try_signals(
    config: Config, model: torch.nn.Module, spec: InputSpec, settings: StepSettings
) -> dict[str, torch.Tensor]:
    """Return the step's signals for a batch of two zeros, after trying all its parts."""
    step = build_step(config, model, spec, settings, device=torch.device("cpu"), is_trial=True)
    scored = step.scored_signals if isinstance(step, InBatchStep) else ()
    signals = tuple(dict.fromkeys((*settings.signals, *settings.sweep_signals, *scored)))
    zeros, targets = torch.zeros(2, *spec.shape), torch.zeros(2, dtype=torch.int64)
    parts = [step.evaluate(zeros, targets, smoothed=True, signals=signals, part=part) for part in step.parts]
    return parts[0]


def _check_halves(config: Config, model: torch.nn.Module, spec: InputSpec) -> None:
    """Refuse half batches of one row for a network that normalizes over rows."""
    workers = _most_workers(config)
    if config.train.batch_size // workers > 3:
        return
    try:
        copy.deepcopy(model).train()(torch.zeros(1, *spec.shape))
    except ValueError as error:
        raise ConfigError(
            f"train.step l2w trains on halves of a worker's batch, here of one row, and {error}: use at least "
            f"train.batch_size={4 * workers}"
        ) from None


def _most_workers(config: Config) -> int:
    return max(1, config.scaling.worker_range[1])


def forward_flops(config: Config, spec: InputSpec) -> int:
    """Return the floating-point operations of one sample's forward pass: two per multiply-add that torch counts.

    A training step takes three times as many; `compute` in metrics.jsonl counts such steps.
    """
    return num_macs(new_model(config, spec).eval(), torch.zeros(2, *spec.shape))  # two samples: two per multiply-add


def notices(config: Config, spec: InputSpec, num_samples: int, method: Method, use_gpu: bool) -> list[str]:
    """Return a line for each thing that the run cannot promise.

    These are scores from logits of lower precision than the paper's, learned weights that can be negative, large
    checkpoints, and signals too large for workers to keep, so that a lost ScoreActor costs the steps since the last
    checkpoint.
    """
    lines = []
    is_bf16 = config.train.precision == "bf16" or (use_gpu and config.train.precision == "auto")
    if "probs" in method.signals and is_bf16:
        lines.append(
            f"method {method.name} scores probabilities of bf16 logits: train.precision=fp32 "
            "(collect.train.precision=fp32 for the scoring run alone) gives the paper's precision"
        )
    if line := _negative_weights(config, spec):
        lines.append(line)
    vectors, lengths = _vectors(config, spec, method)
    for name, column in vectors.items():
        size = num_samples * lengths[name] * np.dtype(column.storage).itemsize / 2**20
        lines.append(
            f"the {name} of each sample, {lengths[name]} numbers in {column.storage}, takes {size:,.1f} MiB in the "
            "temporary folder of the ScoreActor's machine ($TMPDIR) until the subset is chosen"
        )
    for name in (*method.signals, *method.sweep_signals):
        floats = lengths.get(name) or signal_floats(name, spec.num_classes)
        size = num_samples * floats * 4 / 2**20
        if floats > 1 and size >= _LARGE_MIB and config.run.checkpoint_epochs == 1:
            lines.append(
                f"each epoch ends with a checkpoint that holds the {name} of all samples, {size / 1024:,.1f} GiB: "
                "run.checkpoint_epochs=5 writes a fifth of these (run.checkpoint_minutes adds some inside long epochs)"
            )
        if floats > 1 and config.scaling.num_workers != 0:
            lines.append(
                f"workers keep no copy of the signal {name} ({floats} numbers per sample, {size:,.1f} MiB for all): if "
                "the ScoreActor dies, the run resumes from its last checkpoint"
            )
    return lines


def check_shards(config: Config, method: Method) -> None:
    """Refuse shards of the score table for a method that needs the vectors of all samples in one place.

    Raises:
        ConfigError: names the vectors and the cure.
    """
    vectors = [name for name, column in method.columns().items() if isinstance(column, VectorColumn)]
    if vectors and config.scaling.score_shards > 1:
        raise ConfigError(
            f"method {method.name} compares the {vectors[0]} of all samples in one place, and scaling.score_shards is "
            f"{config.scaling.score_shards}: set scaling.score_shards=1"
        )


def check_vectors(config: Config, spec: InputSpec, num_samples: int, method: Method) -> None:
    """Refuse vectors that do not fit on this machine's disk, where the ScoreActor is if there are no workers.

    With workers, the ScoreActor checks its own machine when the first vectors come.

    Raises:
        ConfigError: names the size and the cure.
    """
    if config.scaling.num_workers == 0:
        vectors, lengths = _vectors(config, spec, method)
        for name, column in vectors.items():
            check_disk(name, num_samples, lengths[name], column.storage)


def _vectors(config: Config, spec: InputSpec, method: Method) -> tuple[dict[str, VectorColumn], dict[str, int]]:
    """Return a method's columns of vectors, and how many numbers each vector has."""
    vectors = {name: column for name, column in method.columns().items() if isinstance(column, VectorColumn)}
    if not vectors:
        return {}, {}
    signals = _try_signals(config, new_model(config, spec), spec, StepSettings.of(method, config))
    return vectors, {name: signals[name][0].numel() for name in vectors}


def _negative_weights(config: Config, spec: InputSpec) -> str:
    """Return a line if learned sample weights can be negative, else ""."""
    options = config.train.step_options
    if config.train.step_name != "l2w" or options["nonnegative"]:
        return ""
    low, high = weight_range(options["epsilon"], options["normalise"], model_exits(config, spec))
    if low >= 0.0:
        return ""
    return (
        f"train.step.epsilon {options['epsilon']} with normalise {options['normalise']} allows weights from {low:.2f} "
        f"to {high:.2f}; as in the paper, a negative weight makes the network unlearn the sample: nonnegative: true "
        "sets such weights to 0"
    )
