"""The folder name of a run: its config's name, its method, what was changed, and a digest.

    digits_infobatch-a1b2c3d4               configs/digits_infobatch.yaml as it is
    digits_infobatch-epochs_5-a1b2c3d4      with train.epochs=5
    digits_infobatch-random_epoch-a1b2c3d4  with method.name=random_epoch

The config's name and the digest identify a run. The words between them are for people; the method is one of them only
where the config's name does not have it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rayprune.config.config import Config, read_config
from rayprune.config.experiments import format_value
from rayprune.config.yaml import flatten_settings, parse_overrides
from rayprune.errors import ConfigError
from rayprune.paths import as_path

_MAX_LABEL = 80  # characters of all words, as file systems limit names to 255 bytes
_MAX_VALUE = 24
_MISSING = object()


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config as `read_config` does, and name the run if the config does not.

    A run keeps the name of the folder it already has, however its settings were given.

    Raises:
        ConfigError: one line that names the file, key, value and cure.
    """
    changes = list(overrides)
    config = read_config(path, changes)
    if config.run.name is not None:
        return config
    stem, digest = Path(path).stem, config.digest()
    label = ""
    for word in _words(config, path, changes):
        if len(label) + len(word) > _MAX_LABEL:
            break
        label += f"-{word}"
    name = f"{stem}{label}-{digest}"
    folder = as_path(config.run.storage_path)
    if not (folder / name).exists():
        name = min((found.name for found in folder.glob(f"{glob.escape(stem)}-*{digest}")), default=name)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def _words(config: Config, path: str | Path, overrides: Sequence[str]) -> Iterator[str]:
    """Yield the method if the config's name lacks it, and each override that changes a setting of the digest."""
    try:
        base = read_config(path)
    except ConfigError:  # the file needs its overrides
        base = None
    method = _text(config.method["name"])
    in_stem = re.search(rf"(?<![a-z0-9]){re.escape(method)}(?![a-z0-9])", Path(path).stem.lower())
    if not in_stem or (base is not None and base.method["name"] != config.method["name"]):
        yield method
    settings, defaults = config.identity(), {} if base is None else base.identity()
    for key in sorted(flatten_settings(parse_overrides(overrides))):
        value = _at(settings, key)
        if key in {"method", "method.name"} or value in (_MISSING, _at(defaults, key)):
            continue
        section, *inner = key.removesuffix(".name").removesuffix(".source").split(".")
        yield f"{'.'.join(inner) or section}_{_text(value)}"


def _at(tree: Any, key: str) -> Any:
    """Return the value at a dotted key, or `_MISSING`."""
    for part in key.split("."):
        tree = tree.get(part, _MISSING) if isinstance(tree, Mapping) else _MISSING
    return tree


def _text(value: Any) -> str:
    """Return a value in the characters of file names; only the name of an object, a schedule or a train step.

    >>> _text("nets/mine.py:Net"), _text([1, 2.5]), _text({"schedule": "linear", "end": 0.5})
    ('Net', '1_2.5', 'linear')
    """
    if isinstance(value, Mapping):
        value = value.get("name", value.get("schedule", value))
    text = value.rpartition(":")[2] if isinstance(value, str) else format_value(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_")[:_MAX_VALUE].rstrip("_.-")
