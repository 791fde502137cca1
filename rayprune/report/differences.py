"""What tells runs apart: the settings in which a run differs from the defaults, or from the other runs of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rayprune.config import Config, make_config
from rayprune.config.experiments import format_value
from rayprune.config.yaml import flatten_settings
from rayprune.core.references import names_code
from rayprune.errors import ConfigError
from rayprune.report.read import RunRecord, as_mapping

_LEFT_OUT = {"run", "compare", "sweep", "audit"}  # sections that change neither the training nor its speed
_MISSING = object()


def from_defaults(run: RunRecord) -> str:
    """Return the settings of a run that differ from the defaults, as `key = value`, or "nothing"."""
    defaults = _defaults(run)
    return _listed({key: value for key, value in _settings(run).items() if defaults.get(key, _MISSING) != value})


def from_each_other(runs: Sequence[RunRecord]) -> list[str]:
    """Return, for each run, the settings that not all of the runs share, as `key = value`, or "nothing".

    Keys that only some runs have, such as the options of a method, are listed at values other than their defaults.
    """
    settings, defaults = [_settings(run) for run in runs], [_defaults(run) for run in runs]
    listed = []
    for own, own_defaults in zip(settings, defaults, strict=True):
        different = {}
        for key, value in own.items():
            values = [other.get(key, _MISSING) for other in settings]
            is_shared = all(other in (value, _MISSING) for other in values)
            if not is_shared or (_MISSING in values and value != own_defaults.get(key, _MISSING)):
                different[key] = value
        listed.append(_listed(different))
    return listed


def _settings(run: RunRecord) -> dict[str, Any]:
    without = _LEFT_OUT if run.metrics[-1].samples_collected else _LEFT_OUT | {"collect"}  # of a scoring run only
    return flatten_settings({key: value for key, value in run.config.items() if key not in without})


def _defaults(run: RunRecord) -> dict[str, Any]:
    """Return the defaults of all keys and of the options of the run's method and train step."""
    plain = _settings_of(make_config({}))
    step = as_mapping(run.setting("train", "step")).get("name", "plain")
    method = run.setting("method", "name")
    # A report imports no code that a run folder names.
    step, method = (None if names_code(name) else name for name in (step, method))
    try:
        named = {"train": {"step": step or "plain"}, "method": {"name": method or "full"}}
        return _settings_of(make_config(named)) | {key: plain[key] for key in ("method.name", "train.step.name")}
    except ConfigError:  # a method without a default for every option
        return plain


def _settings_of(config: Config) -> dict[str, Any]:
    return flatten_settings(config.model_dump(mode="json", exclude=_LEFT_OUT))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {format_value(value)}" for key, value in settings.items()) or "nothing"
