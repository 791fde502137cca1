"""A run's configuration: strict YAML sections and dotted overrides; every mistake is reported in one line."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from rayprune.config.experiments import AuditSection, CompareSection, SweepSection
from rayprune.config.schema import (
    CollectSection,
    DataSection,
    ModelSection,
    OptimSection,
    RunSection,
    ScalingSection,
    Strict,
    TrainSection,
    absolute_method,
)
from rayprune.config.shipped import config_hint, find_config
from rayprune.config.yaml import merge, parse_overrides, read_yaml
from rayprune.core.bases.static import ScoredMethod
from rayprune.core.redaction import check_secrets, redacted_tree
from rayprune.core.references import closest
from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError
from rayprune.methods import Method, build_method
from rayprune.methods.registry import method_fields

# Keys left out of the digest at these default values, so that adding the key did not rename the runs of a config.
_NEUTRAL: dict[str, dict[str, Any]] = {
    "train": {"record": (), "compile": False, "step": {"name": "plain"}},
    "data": {"hold_out": None, "relabel": None, "relabel_at": 0.5},
    "collect": {"runs": 1, "embedder": None},
}

_MOST_SUGGESTED_BATCH = 4_096  # one that fits a range of workers may have 28 digits

# The method of an audit's runs; a reference, because only an audit uses it.
CROSS_FIT = "rayprune.core.audit.cross_fit:CrossFit"
THRESHOLD_SAMPLES = "rayprune.sources.threshold_samples:with_threshold_samples"


class Config(Strict):
    """Hold a whole run's configuration."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "full"}, description="the selection method: its name, or its name and its keys"
    )
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    scaling: ScalingSection = ScalingSection()
    run: RunSection = RunSection()
    collect: CollectSection = CollectSection()
    audit: AuditSection = AuditSection()
    compare: CompareSection = CompareSection()
    sweep: SweepSection = SweepSection()

    @field_validator("method", mode="before")
    @classmethod
    def _resolve_method(cls, value: Any) -> dict[str, Any]:
        method = {"name": value} if isinstance(value, str) else value
        if isinstance(method, Mapping) and isinstance(method.get("name"), str):
            method = absolute_method(method)
        return build_method(method).to_config()

    @model_validator(mode="after")
    def _check_batch_size(self) -> Config:
        fewest, most = (max(1, workers) for workers in self.scaling.worker_range)
        # With a range, a batch must divide by every number of workers in it, as the run may get any of them.
        divisor, enough = self.train.accumulate, max(self.train.batch_size, _MOST_SUGGESTED_BATCH)
        for number in range(fewest, most + 1):
            divisor = math.lcm(divisor // self.train.accumulate, number) * self.train.accumulate
            if divisor > enough:  # it grows as fast as a factorial
                break
        if self.train.batch_size % divisor:
            nearest = max(divisor, round(self.train.batch_size / divisor) * divisor)
            workers, cure = f"{fewest} workers", f"use {nearest}"
            if fewest != most:
                workers = f"every number of workers from {fewest} to {most}"
            if divisor > _MOST_SUGGESTED_BATCH:
                rows = max(1, self.train.batch_size // self.train.accumulate)
                fitting = [number for number in range(1, min(most, _MOST_SUGGESTED_BATCH) + 1) if rows % number == 0]
                cure = f"set a number of workers that divides it, such as scaling.num_workers={fitting[-1]}"
            raise ConfigError(
                f"train.batch_size {self.train.batch_size} does not divide by {workers} × "
                f"{self.train.accumulate} micro-batches: {cure}"
            )
        return self

    @model_validator(mode="after")
    def _check_stop_after(self) -> Config:
        if self.train.stop_after is not None and self.train.stop_after > self.train.epochs:
            raise ConfigError(
                f"train.stop_after = {self.train.stop_after}: the run has {self.train.epochs} epochs, leave it out"
            )
        return self

    @property
    def last_epoch(self) -> int:
        """The number of epochs that the run trains: train.stop_after, or train.epochs."""
        return self.train.stop_after or self.train.epochs

    def build_method(self) -> Method:
        """Return the method that the config names."""
        return build_method(self.method)

    def scoring(self, number: int = 0) -> Config:
        """Return the config of a static method's scoring run: the first epochs, on all samples.

        Args:
            number: which of the `collect.runs`, from 0.

        Raises:
            ConfigError: a key of `collect` is wrong.
        """
        if "stop_after" in self.collect.train:
            raise ConfigError("collect.train.stop_after is set by the method (its trajectory): leave it out")
        for name in ("train", "optim"):  # data and model pass unknown keys on
            fields = type(getattr(self, name)).model_fields
            for key in self.collect.changes[name]:
                if key not in fields:
                    raise ConfigError(f"unknown key {f'collect.{name}.{key}'!r}: {closest(key, fields)}")
        method = self.build_method()
        self._check_collect(method)
        tree = self.model_dump(mode="json", exclude={"collect", "compare", "sweep", "audit"})
        tree["train"].pop("validate_every")
        tree = merge(tree, self.collect.changes)
        epochs, needed = tree["train"]["epochs"], method.collect_epochs
        if epochs < needed:
            raise ConfigError(
                f"method {self.method['name']!r} scores over {needed} epochs, and the run has {epochs}: set "
                f"collect.train.epochs={needed} or more (the learning-rate schedule of the scoring run is that long)"
            )
        # Validating the scoring run would cost time and change nothing.
        tree["train"] = {"validate_every": needed, **tree["train"], "stop_after": needed}
        folder = f"{self.run.storage_path.rstrip('/')}/{self.run.name}"
        name = "collect" if number == 0 else f"collect_{number + 1}"
        tree["run"] |= {"storage_path": folder, "name": name, "resume": "auto"}
        tree["train"]["seed"] += number
        tree["collect"] = {"embedder": self.collect.embedder}
        # Scores do not depend on the selection made from them, so that another ratio can reuse the scoring run.
        defaults = method_fields(type(method))
        tree["method"] |= {name: defaults[name] for name in method.selection_fields}
        return make_config(tree)

    def auditing(self, number: int = 0) -> Config:
        """Return the config of one run of an audit, which leaves out one fold of `audit.folds`.

        Args:
            number: which of the `audit.folds` × `audit.repeats` runs.

        Raises:
            ConfigError: a key of `audit` is wrong.
        """
        audit = self.audit
        repeat, left_out = divmod(number, audit.folds)
        for name, keys in (("train", audit.train), ("optim", audit.optim)):
            fields = type(getattr(self, name)).model_fields
            for key in keys:
                if key not in fields:
                    raise ConfigError(f"unknown key {f'audit.{name}.{key}'!r}: {closest(key, fields)}")
        tree = self.model_dump(mode="json", exclude={"collect", "compare", "sweep", "audit"})
        tree["train"].pop("validate_every")
        tree = merge(tree, {"train": audit.train, "optim": audit.optim})
        tree["train"] = {"validate_every": tree["train"]["epochs"], **tree["train"], "stop_after": None, "record": []}
        tree["train"]["seed"] += repeat  # other folds, too
        skip = tree["train"]["epochs"] // 2
        fold = {"folds": audit.folds, "left_out": left_out, "window": audit.window, "skip": skip}
        if audit.threshold_samples:
            # The number of classes and labels are then those of this run: folds must not depend on them.
            fold["stratify"] = False
            data = {key: value for key, value in tree["data"].items() if key != "augment"}
            extra = {"source": THRESHOLD_SAMPLES, "data": data, "seed": tree["train"]["seed"], "number": left_out}
            tree["data"] = {**extra, "augment": tree["data"]["augment"]}
        tree["method"] = {"name": CROSS_FIT, **fold}
        folder = f"{self.run.storage_path.rstrip('/')}/{self.run.name}"
        name = f"fold_{left_out + 1}" + (f"_repeat_{repeat + 1}" if repeat else "")
        tree["run"] |= {"storage_path": folder, "name": name, "resume": "auto"}
        return make_config(tree)

    def _check_collect(self, method: Method) -> None:
        """Refuse what the method cannot use: several scoring runs, or an embedder; or what it lacks."""
        if self.collect.runs > 1 and not isinstance(method, ScoredMethod):
            raise ConfigError(
                f"collect.runs = {self.collect.runs}: averages the scores of methods such as el2n, and "
                f"{method.name} chooses by no single score: leave it out"
            )
        if self.collect.embedder is None:
            return
        if method.sweep_signals != ("embedding",) or set(method.signals) - {"loss"}:
            raise ConfigError(
                f"collect.embedder gives embeddings alone, and method {method.name!r} also needs others: use a method "
                "such as k_center, or leave it out"
            )
        if method.collect_epochs != 1:
            raise ConfigError("collect.embedder makes one forward pass and trains nothing: set method.score_epochs=1")

    def identity(self) -> dict[str, Any]:
        """Return the settings that affect the result, nested and in plain types; paths here and secrets do not."""
        excluded: Any = dict.fromkeys(("scaling", "run", "compare", "sweep", "audit"), True)
        # Runs compare the data's fingerprint instead of its paths, and a higher stop_after continues a run.
        excluded |= {
            "data": {"path", "cache", "cache_dir", "buffer_bytes", "max_pixels"},
            "train": {"stop_after"},
            "collect": set(),
        }
        for section, values in _NEUTRAL.items():
            excluded[section] |= {key for key, value in values.items() if getattr(getattr(self, section), key) == value}
        if not self.build_method().collect_epochs:
            excluded["collect"] = True
        return dict(redacted_tree(self.model_dump(mode="json", exclude=excluded)))

    def shown(self, *left_out: str) -> dict[str, Any]:
        """Return the settings without secrets, nested and in plain types: all that may leave this process."""
        return dict(redacted_tree(self.model_dump(mode="json", exclude=set(left_out))))

    def digest(self) -> str:
        """Return 8 hexadecimal digits over the settings that affect the result (`identity`)."""
        content = json.dumps(self.identity(), sort_keys=True)
        content = re.sub(r'"[^"]*/([^"/]+\.py:[^"]+)"', r'"\1"', content)
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, without secrets; reading it back gives an otherwise equal Config."""
        left_out = () if self.sweep.space else ("sweep",)
        return yaml.safe_dump(self.shown(*left_out), sort_keys=False, allow_unicode=True)


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config and lay the overrides over it; `run.name` is None if neither sets it.

    Args:
        path: a file, or the name of a shipped config; see `find_config`.
        overrides: `key.sub=value` words.

    Raises:
        ConfigError: one line that names the file, key, value and cure.
    """
    file = find_config(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"config {str(file)!r} can't be read: {error.strerror}: {config_hint(file)}") from None
    except OSError as error:
        raise ConfigError(
            f"config {str(file)!r} can't be read: {error.strerror}: name a .yaml file that you can read"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {str(file)!r} is not valid UTF-8: save it as UTF-8") from None
    try:
        tree = read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"config {str(file)!r} is not valid YAML ({error}): correct it") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(file)!r} has no sections: write at least method: {{name: full}}")
    tree = merge(tree, parse_overrides(overrides))
    check_secrets(tree, f"config {str(file)!r}")
    return make_config(tree)


def make_config(tree: Mapping[str, Any]) -> Config:
    """Build a config from a nested mapping.

    Raises:
        ConfigError: one line on the first mistake: key, value, allowed range or closest match.
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_first_mistake(error)) from None


def _first_mistake(error: ValidationError) -> str:
    # Unknown keys first: a misspelled key often causes the other messages.
    mistake = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    path = [str(part) for part in mistake["loc"]]
    if mistake["type"] == "extra_forbidden":
        section: Any = Config
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {'.'.join(path)!r}: {closest(path[-1], section.model_fields)}"
    # After the key, pydantic names positions and members of unions, which mean nothing to a user.
    key = ".".join(path[:2])
    message = re.sub(r"^(Value error|Assertion failed), ", "", mistake["msg"])
    message = re.sub(r"^Input should be\b", "must be", message)
    message = message.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    message = message[:1].lower() + message[1:]
    if mistake["type"] == "model_type":
        message = "must be a mapping of keys, or left out"
    if mistake["type"] == "value_error" and (len(path) < 2 or key in message):
        return message
    return f"{key} = {short_repr(mistake['input'])}: {message}"
