"""The sections of a config: keys, types and ranges.

Keys of a data source or a model pass through to it; every other unknown key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator, model_validator

from rayprune.core.references import absolute_reference, closest
from rayprune.core.step_options import step_config
from rayprune.core.validation import UNBOUNDED, AtMost, check_keys, mismatch
from rayprune.errors import ConfigError
from rayprune.methods.registry import method_class
from rayprune.paths import as_path

Auto = Literal["auto"]
TRACKERS = ("mlflow", "wandb")
Decay = Annotated[float, Field(ge=0, lt=1)]
Reference = Annotated[str, AfterValidator(absolute_reference)]


def _check_auto_count(value: Any) -> Any:
    if value != "auto" and value < 1:
        raise ConfigError("must be at least 1, or auto")
    return value


AutoCount = Annotated[Auto | int, AfterValidator(_check_auto_count)]


def absolute_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's config with absolute paths, as actors run in other folders."""
    absolute = {**method, "name": absolute_reference(method["name"])}
    for field in method_class(absolute["name"]).path_fields:
        if isinstance(path := method.get(field), str) and path and "://" not in path:
            absolute[field] = str(Path(path).expanduser().absolute())
    if isinstance(inner := method.get("of"), Mapping) and isinstance(inner.get("name"), str):
        absolute["of"] = absolute_method(inner)
    return absolute


class Strict(BaseModel, extra="forbid", frozen=True, validate_default=True):
    """Refuse unknown keys."""


class Section(Strict):
    """Refuse values of another type than annotated."""

    @field_validator("*", mode="before")
    @classmethod
    def _check_type(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic accepts true and "1" as numbers, and reports each member of a union in its own message.
        field = cls.model_fields[str(info.field_name)]
        if problem := mismatch(value, Annotated[field.annotation, *field.metadata, None]):
            raise ConfigError(problem)
        return value


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training images, drawn anew in every epoch.

    Args:
        crop: pixels of zero padding on each side before a random crop to the original size; 0: none.
        flip: flip half of the images horizontally.
        resized_crop: side of the network's input, in pixels, to which a random part of each image is resized;
            validation takes the central square of this side. Store images at about 8/7 of it (data.image_size=256 for
            224); 0: none.
        scale: the smallest and the largest share of the image's area in that part.
    """

    crop: int = 0
    flip: bool = False
    resized_crop: int = 0
    scale: tuple[float, float] = (0.08, 1.0)


class DataSection(Section, extra="allow"):
    """The data source; other keys belong to the source."""

    source: Reference = Field("digits", description="a built-in source, or file.py:function")
    limit: Annotated[int | None, UNBOUNDED] = Field(None, ge=1, description="train on the first n samples only")
    hold_out: float | None = Field(
        None, gt=0, lt=1, description="share of the training samples to validate on, instead of the validation part"
    )
    relabel: str | None = Field(
        None, description="an audit.parquet of the training samples, or its run folder: train on its suggested labels"
    )
    relabel_at: float = Field(
        0.5, gt=0, le=1, description="replace labels that are wrong with at least this probability, by data.relabel"
    )
    cache: Literal["auto", "memory", "disk", "none"] = Field(
        "auto", description="where to keep decoded samples; auto: on disk if there is room"
    )
    augment: Auto | dict[str, Any] = Field(
        "auto", description="crop (pixels), flip, resized_crop (pixels), scale; auto: the usual one of the dataset"
    )

    @model_validator(mode="before")
    @classmethod
    def _absolute_paths(cls, values: Any) -> Any:
        return {k: absolute_reference(v) for k, v in values.items()} if isinstance(values, Mapping) else values

    @field_validator("relabel")
    @classmethod
    def _absolute_audit(cls, value: str | None) -> str | None:
        return None if value is None else str(as_path(value).absolute())

    @model_validator(mode="after")
    def _check_relabel(self) -> DataSection:
        if self.relabel is None and self.relabel_at != 0.5:
            raise ConfigError(f"data.relabel_at = {self.relabel_at} needs an audit: set data.relabel=RUN/audit.parquet")
        return self

    @field_validator("augment")
    @classmethod
    def _check_augmentation(cls, value: Any) -> Any:
        if value != "auto":
            check_keys(Augmentation, value, "data.augment", "the augmentation")
            for key in ("crop", "resized_crop"):
                if value.get(key, 0) < 0:
                    raise ConfigError(f"data.augment.{key} = {value[key]}: must be at least 0 pixels")
            if value.get("crop") and value.get("resized_crop"):
                raise ConfigError("data.augment.crop and resized_crop exclude each other: leave one out")
            low, high = value.get("scale", (1, 1))
            if not 0 < low <= high <= 1:
                raise ConfigError(f"data.augment.scale = {[low, high]}: must be [low, high] with 0 < low ≤ high ≤ 1")
        return value

    @property
    def source_keys(self) -> dict[str, Any]:
        """The keys that belong to the source."""
        return dict(self.model_extra or {})


class ModelSection(Section, extra="allow"):
    """The network; other keys are its options."""

    name: Reference = Field("resnet8", description="a built-in model, torchvision:NAME, or file.py:function")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that belong to the model."""
        return dict(self.model_extra or {})


class TrainSection(Section):
    """Length, batches and precision of training."""

    epochs: int = Field(20, ge=1, description="passes over the selected samples")
    batch_size: Annotated[int, AtMost(100_000_000)] = Field(
        128, ge=1, description="global batch: all workers together, accumulation included"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the weights, the selection, the order and the augmentation")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: mixed precision; auto: bf16 on a GPU that supports it"
    )
    last_batch: Literal["pad", "drop"] = Field(
        "pad",
        description="the incomplete last batch of an epoch: pad fills it with rows of weight 0, drop leaves it out",
    )
    accumulate: int = Field(1, ge=1, description="micro-batches per batch of a worker")
    clip_norm: float | None = Field(None, gt=0, description="maximum gradient norm")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread evenly over all classes")
    channels_last: Auto | bool = Field("auto", description="memory layout of images; auto: true")
    compile: bool = Field(False, description="torch.compile the network, which slows the first epoch")
    validate_every: int = Field(1, ge=1, description="epochs between validations; the last epoch always validates")
    step: str | dict[str, Any] = Field(
        "plain", description="plain, exits, l2w or file.py:Class, or {name: …} with its options"
    )
    stop_after: int | None = Field(None, ge=1, description="stop after so many epochs; schedules still span all epochs")
    record: tuple[str, ...] = Field((), description="signals whose mean over the visits goes to scores.parquet")
    max_nonfinite: Annotated[int, UNBOUNDED] = Field(
        100, ge=0, description="NaN or infinite losses in a run before training stops"
    )

    @field_validator("step")
    @classmethod
    def _resolve_step(cls, value: str | dict[str, Any]) -> dict[str, Any]:
        resolved = step_config(value)
        return {**resolved, "name": absolute_reference(resolved["name"])}

    @property
    def step_name(self) -> str:
        """The name of the train step."""
        return str(step_config(self.step)["name"])

    @property
    def step_options(self) -> dict[str, Any]:
        """All options of the train step."""
        return {key: value for key, value in step_config(self.step).items() if key != "name"}

    @property
    def meta_interval(self) -> int:
        """Batches between updates of learned sample weights, from the first batch of each epoch on; 0 for none."""
        return int(self.step_options.get("meta_interval", 0))


class OptimSection(Section):
    """Optimizer and learning-rate schedule; the schedule depends on the fraction of training done."""

    name: Literal["sgd", "adamw"] = Field("sgd", description="the optimizer")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="Nesterov momentum for sgd")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of adamw")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters; decoupled for adamw")
    schedule: Literal["constant", "cosine", "onecycle", "step"] = Field("cosine", description="of the learning rate")
    warmup: float = Field(0.0, ge=0, lt=1, description="linear warm-up over this fraction of training")
    milestones: tuple[float, ...] = Field((0.5, 0.75), description="of schedule step, as fractions of training")
    gamma: float = Field(0.1, gt=0, le=1, description="of schedule step: factor on the rate at each milestone")

    @field_validator("milestones")
    @classmethod
    def _check_ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(a < b for a, b in pairwise((0, *value, 1))):
            raise ConfigError("must ascend between 0 and 1: shares of the run, such as [0.5, 0.75]")
        return value

    @model_validator(mode="after")
    def _check_combination(self) -> OptimSection:
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ConfigError("optim.nesterov = True needs momentum: set optim.momentum=0.9, or optim.nesterov=false")
        if self.schedule == "onecycle" and self.warmup > 0:
            raise ConfigError(f"optim.warmup = {self.warmup}: schedule onecycle warms up by itself, set optim.warmup=0")
        return self


class ScalingSection(Section):
    """Number of workers, their resources and their data stream."""

    num_workers: Annotated[int | tuple[int, int], AtMost(4_096)] = Field(
        1, description="0 trains in this process, without a Ray cluster; [min, max] uses what the cluster has"
    )
    use_gpu: Auto | bool = Field("auto", description="auto: if the cluster has a GPU")
    cpus_per_worker: Auto | float = Field("auto", description="CPUs that Ray reserves for each worker")
    threads: Annotated[Auto | int, AtMost(4_096)] = Field(
        "auto", description="of torch in each worker; auto: the CPUs divided by the workers"
    )
    stream: Literal["auto", "ray", "local", "device"] = Field(
        "auto", description="ray: through Ray Data; local: each worker reads; device: decoded once, kept on the device"
    )

    score_shards: Annotated[int, AtMost(1_024)] = Field(
        1, ge=1, description="actors over which the score table is spread; more where it is too large for one machine"
    )

    @property
    def worker_range(self) -> tuple[int, int]:
        """The minimum and the maximum number of workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @field_validator("num_workers")
    @classmethod
    def _check_range(cls, value: Any) -> Any:
        if not (1 <= value[0] <= value[1] if isinstance(value, tuple) else value >= 0):
            raise ConfigError("must be at least 0, or [min, max] with 1 ≤ min ≤ max")
        return value

    @field_validator("cpus_per_worker", "threads")
    @classmethod
    def _check_positive(cls, value: Any) -> Any:
        if value != "auto" and not value > 0:
            raise ConfigError("must be above 0, or auto")
        return value


class RunSection(Section):
    """The run's folder, and recovery from failures."""

    storage_path: str = Field(
        "runs",
        description="folder of run folders, or a URI such as s3://bucket/runs; on a cluster, one that all machines see",
    )
    address: str = Field(
        "auto", description="auto: the cluster of RAY_ADDRESS, else a local Ray; local: always a local Ray; HOST:PORT"
    )
    name: str | None = Field(None, description="folder name; default: the config's name and a digest of its content")
    resume: str = Field("auto", description="auto: continue; never: refuse a folder with a run; a path: start from it")
    checkpoint_epochs: Annotated[int, UNBOUNDED] = Field(
        1, ge=1, description="epochs between checkpoints at their ends; more where the score table is large"
    )
    checkpoint_steps: Annotated[int | None, UNBOUNDED] = Field(
        None, ge=1, description="steps between checkpoints inside an epoch"
    )
    checkpoint_minutes: float | None = Field(10.0, gt=0, description="minutes between checkpoints inside an epoch")
    max_failures: Annotated[int, UNBOUNDED] = Field(3, ge=-1, description="restarts of the worker group; -1: no limit")
    stall_seconds: float = Field(120.0, gt=0, description="silence of a rank, the actor or the stream to report")
    keep_checkpoints: Annotated[int, UNBOUNDED] = Field(
        2, ge=1, description="number of newest checkpoints that stay on disk"
    )
    keep_selections: Annotated[int, UNBOUNDED] = Field(
        10, ge=0, description="number of newest epochs whose selections stay on disk"
    )
    trackers: tuple[str, ...] = Field((), description="mlflow, wandb; TensorBoard is always written")

    def storage_folder(self) -> Path:
        """Return the folder of run folders, absolute.

        Raises:
            ConfigError: Ray deletes this folder.
        """
        folder = as_path(self.storage_path).resolve()
        if "working_dir_files" in folder.parts:
            raise ConfigError(
                f"run.storage_path = {self.storage_path!r} lies in the working directory of a Ray job, which Ray "
                "deletes: use an absolute path that all machines share, such as run.storage_path=/mnt/runs"
            )
        return folder

    @field_validator("storage_path")
    @classmethod
    def _check_storage(cls, value: str) -> str:
        as_path(value)
        return value

    @field_validator("trackers")
    @classmethod
    def _check_trackers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in TRACKERS:
                raise ConfigError(f"unknown tracker {name!r}: {closest(name, TRACKERS)}")
        return tuple(dict.fromkeys(value))

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or value in {".", ".."} or "/" in value or "\\" in value):
            raise ConfigError("must be a folder name without slashes: set run.storage_path for its parent folder")
        return value


class CollectSection(Section):
    """How a static method, which chooses one subset, gets its scores before a network trains on the subset."""

    fresh: bool = Field(True, description="train a new network on the subset; false continues the one that scored")
    trajectories: str | None = Field(None, description="score logged E_Output.npy, E_Index.npy in this folder instead")
    runs: Annotated[int, AtMost(1_000)] = Field(
        1, ge=1, description="scoring runs, with the seeds train.seed, +1, …; their scores are averaged"
    )
    embedder: str | None = Field(
        None,
        description="a pretrained network for the embeddings, torchvision:NAME or module:function, instead of training",
    )
    data: dict[str, Any] = Field(default_factory=dict, description="keys of data that differ while scoring")
    model: dict[str, Any] = Field(default_factory=dict, description="keys of model that differ while scoring")
    train: dict[str, Any] = Field(default_factory=dict, description="keys of train that differ while scoring")
    optim: dict[str, Any] = Field(default_factory=dict, description="keys of optim that differ while scoring")

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """Section name → the keys that differ."""
        return {name: getattr(self, name) for name in ("data", "model", "train", "optim")}

    @model_validator(mode="after")
    def _check_combination(self) -> CollectSection:
        changed = [f"collect.{name}.{key}" for name, keys in self.changes.items() for key in keys]
        if self.trajectories is not None:
            changed = ["collect.trajectories", *changed]
        changed += [f"collect.{name}" for name in ("runs", "embedder") if getattr(self, name) not in (1, None)]
        if not self.fresh and changed:
            raise ConfigError(f"collect.fresh = False makes no scoring run: leave out {', '.join(changed)}")
        if self.trajectories is not None and len(changed) > 1:
            raise ConfigError(f"collect.trajectories replaces the scoring run: leave out {', '.join(changed[1:])}")
        return self

    @field_validator("trajectories")
    @classmethod
    def _absolute_path(cls, value: str | None) -> str | None:
        return None if value is None else str(Path(value).expanduser().absolute())
