"""The configs that runs, sweeps, comparisons and audits have written, read again.

A stored config may come from anyone. It is compared with the user's without running its code, and it is used only if
the user names or trusts its code; see `rayprune.config.code`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rayprune.config import Config, make_config
from rayprune.config.code import Trust, check_code, code_references, with_named_code
from rayprune.config.yaml import flatten, merge, parse_overrides, read_yaml
from rayprune.core.redaction import check_secrets
from rayprune.core.references import absolute_reference
from rayprune.engine.storage.run_folder import read_json
from rayprune.errors import ConfigError, RunFolderError, one_line

_CURE = "restore it or choose another run.name"


def read_tree(file: Path, cure: str = _CURE) -> dict[str, Any]:
    """Return the settings in a file that a run, sweep, comparison or audit has written, without checking them.

    Args:
        file: config.yaml, sweep.yaml, compare.yaml or audit.yaml.
        cure: the end of the error message.

    Raises:
        RunFolderError: the file cannot be read, or holds no settings.
    """
    try:
        return dict(read_yaml(file.read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{file} can't be read ({one_line(error)}): {cure}") from None


def read_like(file: Path, own: Config) -> Config | None:
    """Return a stored config to compare with the user's; None if it names other code, which does not run.

    Raises:
        RunFolderError: the file cannot be read, or does not hold a valid config.
    """
    named = set(code_references(own.model_dump(mode="json")).values())
    tree = with_named_code(read_tree(file), named)
    return _config(tree, file, _CURE) if set(code_references(tree).values()) <= named else None


def read_trusted(file: Path, overrides: Iterable[str] = (), trust: Trust = False, **replaced: Any) -> Config:
    """Return a run's config, to use it: with the user's overrides, and only with code that the user names or trusts.

    Args:
        file: the run's config.yaml.
        overrides: `key.sub=value` words.
        trust: run the code that the config names, whatever it is, or that of a digest.
        **replaced: section name → keys to replace.

    Raises:
        ConfigError: an override is wrong or would change what was trained, the config names code that is not trusted,
            or it lacks a secret.
        RunFolderError: the file cannot be read, or does not hold a valid config.
    """
    changes = parse_overrides(overrides)
    tree = merge(read_tree(file, "restore it"), changes)
    named = {absolute_reference(reference) for reference in code_references(changes).values()}
    environment = file.with_name("environment.json")
    facts = read_json(environment) if environment.exists() else None
    recorded = facts.get("code") if isinstance(facts, Mapping) else None
    check_code(tree, file, named=named, recorded=recorded if isinstance(recorded, Mapping) else {}, trust=trust)
    check_secrets(tree, str(file))
    if not changes:
        return _config(merge(tree, replaced), file, "restore it")
    config = make_config(merge(tree, replaced))
    stored = read_like(file, config)
    if stored is None or config.digest() != stored.digest():
        raise ConfigError(
            f"{', '.join(flatten(changes))} would change what was trained: set keys of audit or scaling, or data.path"
        )
    return config


def _config(tree: Mapping[str, Any], file: Path, cure: str) -> Config:
    try:
        return make_config(tree)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file} can't be read ({one_line(error)}): {cure}") from None
