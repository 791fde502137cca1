"""A run's configuration: strict YAML, dotted overrides, one line for every mistake.

Keys of a data source or a model pass through to it; every other unknown key is refused with the closest match.
"""

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

from rayprune.config.experiments import CompareSection, SweepSection
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
from rayprune.config.yaml import merge, parse_overrides, read_yaml
from rayprune.core.references import closest
from rayprune.core.validation import shown
from rayprune.errors import ConfigError
from rayprune.methods import Method, build_method
from rayprune.methods.registry import method_fields


class Config(Strict):
    """Hold a whole run's configuration."""

    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "full"})
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    scaling: ScalingSection = ScalingSection()
    run: RunSection = RunSection()
    collect: CollectSection = CollectSection()
    compare: CompareSection = CompareSection()
    sweep: SweepSection = SweepSection()

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> dict[str, Any]:
        named = {"name": value} if isinstance(value, str) else value
        if isinstance(named, Mapping) and isinstance(named.get("name"), str):
            named = absolute_method(named)
        return build_method(named).to_config()

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        fewest, most = (max(1, workers) for workers in self.scaling.worker_range)
        # With a range, a batch has to divide by every number of workers in it: the run may get any of them.
        shares = math.lcm(*range(fewest, most + 1)) * self.train.accumulate
        if self.train.batch_size % shares:
            nearest = max(shares, round(self.train.batch_size / shares) * shares)
            workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise ConfigError(
                f"train.batch_size {self.train.batch_size} does not divide by {workers} workers × "
                f"{self.train.accumulate} micro-batches: use {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _stops_in_time(self) -> Config:
        if self.train.stop_after is not None and self.train.stop_after > self.train.epochs:
            raise ConfigError(
                f"train.stop_after = {self.train.stop_after}: the run has {self.train.epochs} epochs, leave it out"
            )
        return self

    @property
    def last_epoch(self) -> int:
        """The epoch that the run ends before: train.epochs, or train.stop_after."""
        return self.train.stop_after or self.train.epochs

    def build_method(self) -> Method:
        """Return the method that the config names."""
        return build_method(self.method)

    def scoring(self) -> Config:
        """Return the config of the run that scores for a static method: its first epochs, on all samples.

        Raises:
            ValueError: a key of `collect` is wrong.
        """
        tree = self.model_dump(mode="json", exclude={"collect", "compare", "sweep"})
        changes = self.collect.changes
        if "stop_after" in self.collect.train:
            raise ConfigError("collect.train.stop_after is the method's to say (its trajectory): leave it out")
        for name, keys in changes.items():
            section: Any = type(getattr(self, name))
            if section.model_config.get("extra") == "forbid":
                for key in keys:
                    if key not in section.model_fields:
                        hint = closest(key, section.model_fields)
                        raise ConfigError(f"unknown key {f'collect.{name}.{key}'!r}: {hint}")
        tree["train"].pop("validate_every")
        tree = merge(tree, changes)
        epochs, needed = tree["train"]["epochs"], self.build_method().collect_epochs
        if epochs < needed:
            raise ConfigError(
                f"method {self.method['name']!r} scores over {needed} epochs, and the run has {epochs}: set "
                f"collect.train.epochs={needed} or more (the learning-rate schedule of the scoring run is that long)"
            )
        # Its own validations would cost and decide nothing.
        tree["train"] = {"validate_every": needed, **tree["train"], "stop_after": needed}
        folder = str(Path(self.run.storage_path) / str(self.run.name))
        tree["run"] |= {"storage_path": folder, "name": "collect", "resume": "auto"}
        # Scores do not depend on how samples are chosen by them: another ratio finds them made.
        method = self.build_method()
        defaults = method_fields(type(method))
        tree["method"] |= {name: defaults[name] for name in method.choosing}
        return make_config(tree)

    def digest(self) -> str:
        """Return 8 hexadecimal digits over what decides the result: all sections but scaling, run, compare and sweep.

        Where files lie on this machine decides nothing: runs compare the data's fingerprint and how it is shuffled.
        """
        left_out: Any = dict.fromkeys(("scaling", "run", "compare", "sweep"), True)
        left_out["data"] = {"path", "cache", "cache_dir", "buffer_bytes"}
        left_out["train"] = {"stop_after"}  # a later command with more of them goes on
        if not self.train.record:
            left_out["train"].add("record")  # at its default it is nothing, as in versions that did not have it
        if not self.train.compile:
            left_out["train"].add("compile")
        if self.train.step == {"name": "plain"}:
            left_out["train"].add("step")
        if self.data.hold_out is None:
            left_out["data"].add("hold_out")
        if not self.build_method().collect_epochs:
            left_out["collect"] = True
        content = json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True)
        content = re.sub(r'"[^"]*/([^"/]+\.py:[^"]+)"', r'"\1"', content)
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    def to_yaml(self) -> str:
        """Return the resolved config as YAML; reading it back gives an equal Config."""
        left_out = None if self.sweep.space else {"sweep"}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=left_out), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config, lay the overrides over it, and name the run where the config does not.

    Raises:
        ValueError: one line that names the file, key, value and cure.
    """
    config = load_tree(path, overrides)
    if config.run.name is None:
        name = f"{Path(path).stem}-{config.digest()}"
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    return config


def load_tree(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config as `load_config` does, and leave `run.name` as it is: None where the config has none.

    Raises:
        ValueError: one line that names the file, key, value and cure.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {str(file)!r} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {str(file)!r} is no UTF-8 text") from None
    try:
        tree = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"config {str(file)!r} is no valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(file)!r} holds no sections: write at least method: {{name: full}}")
    return make_config(merge(tree, parse_overrides(overrides)))


def make_config(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping.

    Raises:
        ValueError: one line on the first mistake: key, value, allowed range or closest match.
    """
    try:
        return Config.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(_first_mistake(error)) from None


def _first_mistake(error: ValidationError) -> str:
    # Unknown keys first: a misspelt key often causes the other messages.
    mistake = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = [str(part) for part in mistake["loc"]]
    if mistake["type"] == "extra_forbidden":
        section: Any = Config
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return f"unknown key {'.'.join(path)!r}: {closest(path[-1], section.model_fields)}"
    # Behind the key pydantic names positions and members of unions; they say nothing to a user.
    key = ".".join(part for part in path[:2])
    message = re.sub(r"^(Value error|Assertion failed), ", "", mistake["msg"])
    message = message[:1].lower() + message[1:]
    if mistake["type"] == "model_type":
        message = "must be a mapping of keys, or left out"
    if mistake["type"] == "value_error" and (len(path) < 2 or key in message):
        return message
    return f"{key} = {shown(mistake['input'])}: {message}"
