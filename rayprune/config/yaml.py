"""Strict YAML, and the `key.sub=value` words that are laid over a config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from rayprune.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Read YAML with 5e-4 as a number, as in YAML 1.2, and refuse a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice in line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"^[-+]?((\d[\d_]*)(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """Parse one YAML document of plain types.

    Raises:
        ConfigError: what is wrong with it, in one line.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Turn `key.sub=value` words into a nested mapping; values are YAML.

    Raises:
        ConfigError: a word without '=' or with an empty key, or a key that is given twice.

    >>> parse_overrides(["train.epochs=3", "optim.lr=5e-2"])
    {'train': {'epochs': 3}, 'optim': {'lr': 0.05}}
    """
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise ConfigError(f"override {word!r} is not of the form key.sub=value")
        try:
            value = read_yaml(text)
        except ValueError as error:
            raise ConfigError(f"override {word!r}: {error}") from None
        branch = tree
        for part in parts[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"override {word!r}: {part!r} is given as a value and as a section")
        if parts[-1] in branch:
            raise ConfigError(f"override {word!r}: {key!r} is given twice, keep one")
        branch[parts[-1]] = value
    return tree


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with top laid over it, section by section; a new `method.name` drops the old method's keys."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            # Another method, model, source or train step has keys of its own: the old one's would only be refused.
            switch = {"method": "name", "model": "name", "data": "source", "step": "name"}.get(key)
            renamed = switch in value and old.get(switch) != value[switch]
            shared = {"limit", "augment", "hold_out", "cache"} if key == "data" else set()
            kept = {k: v for k, v in old.items() if not renamed or k in shared}
            merged[key] = merge(kept, value)
        else:
            merged[key] = value
    return merged
