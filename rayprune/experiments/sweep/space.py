"""The points of a sweep's space, and the config of the trial at each.

A value replaces the base's value at its key. Another method, model or source drops the base's keys of the old one. Keys
of the space must be valid for all swept methods.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayprune.config import Config, make_config
from rayprune.config.experiments import NAMED, NAMING, Axis, SweepSection, format_value
from rayprune.config.yaml import merge
from rayprune.core.redaction import redacted_tree
from rayprune.core.references import absolute_reference
from rayprune.errors import ConfigError

Point = dict[str, Any]


def listed_points(section: SweepSection) -> list[Point]:
    """Return the points of a grid, or those that a random search draws from its seed; optuna proposes its own.

    A random search draws `num_trials` points at each combination of the keys that are a `grid`.

    >>> [list(point.values()) for point in listed_points(SweepSection(space={"a.b": [1, 2], "c.d": [3]}))]
    [[1, 3], [2, 3]]
    """
    axes = section.axes
    if section.search == "grid":
        return [dict(zip([axis.key for axis in axes], values, strict=True)) for values in _product(axes)]
    rng = np.random.default_rng([section.seed])
    fixed = [axis for axis in axes if axis.form == "grid"]
    points = []
    for values in _product(fixed):
        at = {axis.key: value for axis, value in zip(fixed, values, strict=True)}
        for _ in range(section.num_trials or 0):
            points.append({axis.key: at[axis.key] if axis.key in at else axis.draw(rng) for axis in axes})
    return points


def _product(axes: Sequence[Axis]) -> Iterator[tuple[Any, ...]]:
    return itertools.product(*(axis.values for axis in axes))


def probe_points(section: SweepSection) -> Iterator[Point]:
    """Yield the points to check: with each method, model and source, every value of each key, or its range's ends."""
    axes = section.axes
    naming = [axis for axis in axes if axis.key in NAMED]
    for names in itertools.product(*(axis.probes for axis in naming)):
        base = {axis.key: axis.probes[0] for axis in axes}
        base |= {axis.key: name for axis, name in zip(naming, names, strict=True)}
        yield base
        for axis in axes:
            if axis not in naming:
                yield from (base | {axis.key: value} for value in axis.probes[1:])


def trial_config(base: Config, point: Mapping[str, Any]) -> Config:
    """Return the config of the trial at a point: the base config with the point's values and without `sweep`.

    Raises:
        ConfigError: a key or value is wrong; one line, with the closest match for an unknown key.
    """
    tree = base.model_dump(mode="json", exclude={"sweep"})
    if base.data.hold_out is None and base.sweep.hold_out:
        tree["data"]["hold_out"] = base.sweep.hold_out  # keep the samples of the final result out of the choice
    settings = list(_settings(point))
    # Names first, as they decide which of the base's keys remain; then shorter keys before the keys below them.
    settings.sort(key=lambda setting: (setting[0] not in NAMING, setting[0].count(".")))
    for key, value in settings:
        section, _, name = key.partition(".")
        if key in NAMING and isinstance(value, str):
            tree = merge(tree, {section: {name: absolute_reference(value)}})
        else:
            _set(tree, key, value)
    config = make_config(tree)
    if config.build_method().collect_epochs and config.collect.fresh and config.collect.trajectories is None:
        config.scoring()
    return config


def _settings(point: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; a whole section replaces the base's values key by key."""
    for key in sorted(point, key=lambda key: key.count(".")):
        value = point[key]
        if key == "method" and isinstance(value, str):
            value = {"name": value}
        if "." not in key and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *branches, leaf = key.split(".")
    for depth, branch in enumerate(branches):
        tree = tree.setdefault(branch, {})
        if not isinstance(tree, dict):
            above = ".".join(branches[: depth + 1])
            raise ConfigError(f"{key!r}: {above!r} is a value, not a mapping: use whole values of {above!r}")
    tree[leaf] = value


def check_space(base: Config) -> list[Point]:
    """Check the points of a space and the ends of its distributions; return the points of a grid or random search.

    Raises:
        ConfigError: no key varies, or a point's config is invalid.
    """
    section = base.sweep
    if not section.space:
        raise ConfigError("nothing varies: add a space to the section sweep, such as method.prune_ratio: [0.3, 0.5]")
    points = [] if section.search == "optuna" else listed_points(section)
    for point in itertools.chain(probe_points(section), points):
        try:
            trial_config(base, point)
        except ValueError as error:
            raise ConfigError(f"sweep.space at {shown_point(point)}: {error}") from None
    return points


def shown_point(point: Mapping[str, Any]) -> str:
    """Return a point as readable text.

    >>> shown_point({"method": {"name": "infobatch", "prune_ratio": 0.3}, "train.epochs": 4})
    'method={name: infobatch, prune_ratio: 0.3} train.epochs=4'
    """
    return " ".join(f"{key}={format_value(value)}" for key, value in point.items())


def trial_name(number: int, point: Mapping[str, Any]) -> str:
    """Return the name of a trial's folder: its number, and 6 hexadecimal digits of a hash of its point."""
    content = json.dumps(redacted_tree(point), sort_keys=True).encode()
    return f"{number:03d}-{hashlib.sha256(content).hexdigest()[:6]}"


def sweep_digest(base: Config) -> str:
    """Return a hash of 8 hexadecimal digits of the settings that determine a sweep's trials."""
    sweep = base.sweep.model_dump(mode="json", exclude={"max_concurrent", "max_failures", "amortise"})
    content = json.dumps([base.digest(), redacted_tree(sweep)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def sweep_folder_of(base: Config, stem: str) -> Path:
    """Return a sweep's folder: `run.name`, or the config's name and a digest, in `run.storage_path`."""
    name = base.run.name or f"{stem}-sweep-{sweep_digest(base)}"
    return base.run.storage_folder() / name
