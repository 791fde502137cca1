"""Strict YAML, `key.sub=value` overrides, and operations on the nested mappings that they give."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError, one_line, redacted

_FLOAT = re.compile(r"^[-+]?((\d[\d_]*)(\.\d*)?([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
# The parser takes about a second for any of these.
MAX_CHARACTERS, MAX_VALUES, MAX_LEVELS = 200_000, 10_000, 40
# Section → the key that names a method, model, source or train step with keys of its own.
_NAME_KEYS = {"method": "name", "model": "name", "data": "source", "step": "name"}
_KEYS_OF_ALL_SOURCES = {"limit", "augment", "hold_out", "cache"}


class _Loader(yaml.SafeLoader):
    """Read YAML with 5e-4 as a number, as in YAML 1.2, and refuse duplicate keys."""

    num_values = level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.num_values += 1
        self.level += 1
        if self.num_values > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES:,} values: write fewer")
        if self.level > MAX_LEVELS:
            raise yaml.YAMLError(f"it nests more than {MAX_LEVELS} mappings or lists: a config has five levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        duplicates = [key for key in keys if keys.count(key) > 1]
        if duplicates:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {duplicates[0]!r} appears twice in the mapping that starts in line {line}")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """Parse one YAML document of plain types.

    Raises:
        ConfigError: it is not valid YAML; the message is one line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"it has {len(text):,} characters, above {MAX_CHARACTERS:,}: a config is a few kilobytes")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no such date, too many digits
        raise ConfigError(_fault(error)) from None


def _fault(error: Exception) -> str:
    """Return what the parser found and where, on one line and without its excerpt of the text."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return one_line(error)
    mark = error.problem_mark
    return redacted(f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(error.problem.split())}")


def _check_size(root: yaml.Node) -> None:
    """Refuse aliases (`*name`) that repeat their values into more than the text could hold, or without end."""
    sizes: dict[int, float] = {}

    def size(node: yaml.Node) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # until it is known: a node that contains itself is endless
            children = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    if size(root) > MAX_VALUES:
        raise ConfigError(f"its aliases (*name) stand for more than {MAX_VALUES:,} values: write fewer of them out")


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Parse `key.sub=value` words into a nested mapping; values are YAML.

    Raises:
        ConfigError: a word without '=' or with an empty key, or a key that appears twice.

    >>> parse_overrides(["train.epochs=3", "optim.lr=5e-2"])
    {'train': {'epochs': 3}, 'optim': {'lr': 0.05}}
    """
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        parts = key.split(".")
        if len(parts) > MAX_LEVELS:
            raise ConfigError(f"override {short_repr(word)} has a key of {len(parts)} parts: keys have five at most")
        if not equals or not all(parts):
            raise ConfigError(f"override {word!r} is not of the form key.sub=value: correct it")
        try:
            value = read_yaml(text)
        except ConfigError as error:
            raise ConfigError(f"override {word!r} is not YAML ({error}): put its value in quotes") from None
        branch = tree
        for part in parts[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"override {word!r}: {part!r} is both a value and a section: keep one")
        if parts[-1] in branch:
            raise ConfigError(f"override {word!r}: {key!r} appears twice, keep one")
        branch[parts[-1]] = value
    return tree


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with top's keys laid over it, section by section.

    Another method, model, source or train step drops the keys of the old one.
    """
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            name = _NAME_KEYS.get(key)
            if name in value and old.get(name) != value[name]:
                old = {k: v for k, v in old.items() if key == "data" and k in _KEYS_OF_ALL_SOURCES}
            value = merge(old, value)
        merged[key] = value
    return merged


def flatten(
    tree: Mapping[str, Any], is_section: Callable[[str, Any], bool] = lambda key, value: isinstance(value, Mapping)
) -> dict[str, Any]:
    """Return dotted key → value of a nested mapping; `is_section` tells which values to descend into.

    >>> flatten({"train": {"epochs": 3}, "seeds": [0, 1]})
    {'train.epochs': 3, 'seeds': [0, 1]}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if is_section(key, value):
            flat |= flatten({f"{key}.{name}": inner for name, inner in value.items()}, is_section)
        else:
            flat[key] = value
    return flat


def flatten_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key → value of a config's sections; a schedule of a ratio is one value.

    >>> flatten_settings({"method": {"prune_ratio": {"schedule": "linear", "end": 0.5}}, "optim": {"schedule": "step"}})
    {'method.prune_ratio': {'schedule': 'linear', 'end': 0.5}, 'optim.schedule': 'step'}
    """

    def is_section(key: str, value: Any) -> bool:
        return isinstance(value, Mapping) and ("." not in key or "schedule" not in value or "name" in value)

    return flatten(tree, is_section)
