"""The command `rayprune schema`, and the keys of configs with type, default and meaning.

The meaning of a key is written once, beside the key: in the `description` of a section's field, or in the docstring of
a method, source, train step, schedule or model. The JSON schema and docs/reference/config.md are made from these.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import click

from rayprune.cli.console import debug_option
from rayprune.core.validation import UNBOUNDED

REQUIRED = inspect.Parameter.empty
_ENTRY = re.compile(r"^([\w*]+(?:, [\w*]+)*): (.*)$", flags=re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes:
        name: without the section.
        hint: the annotation of its values.
        default: REQUIRED if there is none.
        meaning: from the description or the docstring; "" if there is none.
        limits: name of the limit (ge, gt, le, lt) → number.
    """

    name: str
    hint: Any
    default: Any
    meaning: str
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)


def entries(text: str) -> dict[str, str]:
    """Return name → text of the dedented lines of an `Args:` or `Attributes:` section; `a, b: …` describes both.

    >>> entries("ratio: r, in [0, 1);\\n    or a schedule.\\nlow, high: bounds.")
    {'ratio': 'r, in [0, 1); or a schedule.', 'low': 'bounds.', 'high': 'bounds.'}
    """
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", text.strip("\n")):
        if match := _ENTRY.match(entry):
            found |= dict.fromkeys(match[1].split(", "), " ".join(match[2].split()))
    return found


def docstring_parts(thing: Any) -> list[tuple[str, str]]:
    """Return the parts of a docstring in their order, (heading, dedented text); text without a heading has ""."""
    parts: list[tuple[str, str]] = []
    # A heading is a line of its own, such as `Args:`, and its text is indented.
    for part in re.split(r"\n\n(?=\S)", inspect.getdoc(thing) or ""):
        heading, _, text = part.partition("\n")
        if re.fullmatch(r"[A-Z]\w*( \w+)?:", heading) and text.startswith("    "):
            parts.append((heading[:-1], textwrap.dedent(text)))
        elif part:
            parts.append(("", part))
    return parts


def meanings(thing: Any) -> dict[str, str]:
    """Return the name → meaning of the arguments or attributes of a class, with its bases', or of a function."""
    found: dict[str, str] = {}
    for owner in reversed(thing.__mro__[:-1]) if isinstance(thing, type) else [thing]:
        if owner.__doc__:
            parts = docstring_parts(owner)
            found |= entries("\n".join(text for heading, text in parts if heading in {"Args", "Attributes"}))
    return found


def keys_of(thing: Any, without: Collection[str] = ()) -> list[Key]:
    """Return the keys that a config section, a dataclass, or a function or class by its signature, takes."""
    if fields := getattr(thing, "model_fields", None):
        return [_key_of_field(name, field) for name, field in fields.items() if name not in without]
    is_signature = isinstance(thing, type) and not dataclasses.is_dataclass(thing)
    hints, told = get_type_hints(thing.__init__ if is_signature else thing), meanings(thing)
    defaults = {name: parameter.default for name, parameter in inspect.signature(thing).parameters.items()}
    if dataclasses.is_dataclass(thing):
        defaults |= {f.name: f.default_factory() for f in dataclasses.fields(thing) if callable(f.default_factory)}
    return [
        Key(name, hints.get(name, Any), default, told.get(name, "").removesuffix("."))
        for name, default in defaults.items()
        if name not in without
    ]


def _key_of_field(name: str, field: Any) -> Key:
    metadata = [each for each in field.metadata if each != UNBOUNDED]
    limits = {kind: getattr(m, kind) for m in metadata for kind in ("ge", "gt", "le", "lt") if hasattr(m, kind)}
    default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
    return Key(name, field.annotation, default, field.description or "", limits)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a section names by a key, and the keys that it then takes.

    Attributes:
        section: the dotted name of the section.
        key: the key of the section that names one.
        shared: keys that the section takes with every name.
        options: name → its class or function.
        own: name → keys that the section takes with this name only.
        references: whether `module:name` and `path/to/file.py:name` are names too.
    """

    section: str
    key: str
    shared: list[Key]
    options: dict[str, Any]
    own: dict[str, list[Key]]
    references: bool


def all_choices() -> dict[str, Choices]:
    """Return the methods, sources, models, train steps and schedules, by section."""
    from rayprune.config.schema import DataSection, ModelSection
    from rayprune.core.method import Method
    from rayprune.core.schedule import SCHEDULES
    from rayprune.core.step_options import STEP_OPTIONS
    from rayprune.methods import METHODS
    from rayprune.nn.models import MODELS
    from rayprune.sources import SOURCES

    method = Key("name", str, REQUIRED, "a built-in method, or file.py:Class")
    step = Key("name", str, REQUIRED, "a built-in train step, or file.py:Class")
    schedule = Key("schedule", str, REQUIRED, "the schedule")
    found: dict[str, Choices] = {}

    def add(section: str, key: str, shared: list[Key], options: Mapping[str, Any], references: bool = True) -> None:
        without = {each.name for each in shared}
        if section == "model":
            without |= {"num_classes", "input_shape"}  # the data sets these
        own = {name: keys_of(thing, without) for name, thing in options.items()}
        found[section] = Choices(section, key, shared, dict(options), own, references)

    add("data", "source", keys_of(DataSection), SOURCES)
    add("model", "name", keys_of(ModelSection), MODELS)
    add("method", "name", [method, *keys_of(Method)], METHODS)
    add("train.step", "name", [step], STEP_OPTIONS)
    add("method.prune_ratio", "schedule", [schedule], SCHEDULES, references=False)
    return found


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of configs, draft 2020-12."""
    from rayprune.config import Config
    from rayprune.config.schema import Augmentation

    schema: dict[str, Any] = _without_titles(Config.model_json_schema())
    definitions, choices = schema["$defs"], all_choices()
    ratio = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    definitions["Schedule"] = {"anyOf": [ratio, _mapping(choices["method.prune_ratio"])]}
    definitions["Method"] = _name_or_mapping(choices["method"])
    definitions["TrainStep"] = _name_or_mapping(choices["train.step"])
    properties = {key.name: _key_schema(key) for key in keys_of(Augmentation)}
    augmentation = {"type": "object", "properties": properties, "additionalProperties": False}
    definitions["Augmentation"] = {"anyOf": [{"const": "auto"}, augmentation]}
    _refer(definitions["DataSection"]["properties"]["augment"], "Augmentation")
    for name, section in (("data", "DataSection"), ("model", "ModelSection")):
        shared = definitions[section]["properties"]
        mapping = _mapping(choices[name], shared, default=shared[choices[name].key]["default"])
        definitions[section] = {"description": definitions[section]["description"], **mapping}
    _refer(schema["properties"]["method"], "Method")
    _refer(definitions["TrainSection"]["properties"]["step"], "TrainStep")
    definitions["CompareSection"]["properties"]["methods"]["items"] = {"$ref": "#/$defs/Method"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "rayprune config", **schema}


def _without_titles(tree: Any) -> Any:
    """Drop pydantic's titles, which repeat the names."""
    if isinstance(tree, Mapping):
        return {key: _without_titles(value) for key, value in tree.items() if key != "title"}
    return [_without_titles(item) for item in tree] if isinstance(tree, list) else tree


def _refer(field: dict[str, Any], definition: str) -> None:
    """Replace the type of a field by a definition; keep its description and default."""
    for keyword in {"type", "anyOf", "additionalProperties"} & field.keys():
        del field[keyword]
    field["$ref"] = f"#/$defs/{definition}"


def _names(choices: Choices) -> dict[str, Any]:
    names: dict[str, Any] = {"enum": sorted(choices.options)}
    return {"anyOf": [names, {"type": "string", "pattern": ":"}]} if choices.references else names


def _mapping(choices: Choices, shared: Mapping[str, Any] | None = None, default: str | None = None) -> dict[str, Any]:
    """Return the schema of a mapping whose keys depend on the name in it; `default` is the name if it has none."""
    shared = shared or {key.name: _key_schema(key) for key in choices.shared}
    shared = {**shared, choices.key: {**shared[choices.key], **_names(choices)}}
    rules = []
    for name, own in choices.own.items():
        condition: dict[str, Any] = {"properties": {choices.key: {"const": name}}}
        if name != default:
            condition["required"] = [choices.key]
        properties = {**dict.fromkeys(shared, True), **{key.name: _key_schema(key) for key in own}}
        rules.append({"if": condition, "then": {"properties": properties, "additionalProperties": False}})
    return {"type": "object", "properties": shared, "required": [] if default else [choices.key], "allOf": rules}


def _name_or_mapping(choices: Choices) -> dict[str, Any]:
    return {"type": ["string", "object"], "if": {"type": "string"}, "then": _names(choices), "else": _mapping(choices)}


def _key_schema(key: Key) -> dict[str, Any]:
    schema = {**_hint_schema(key.hint), "description": key.meaning}
    return schema if key.default in (REQUIRED, None) else {**schema, "default": key.default}


def _hint_schema(hint: Any) -> dict[str, Any]:
    from pydantic import TypeAdapter

    from rayprune.core.schedule import Schedule

    if hint is Any:
        return {}
    if hint is Schedule:
        return {"$ref": "#/$defs/Schedule"}
    if get_origin(hint) in (Union, UnionType):
        # A schedule's definition covers the numbers, with their limits.
        left_out = (Any, float) if Schedule in get_args(hint) else (Any,)
        members = [_hint_schema(member) for member in get_args(hint) if member not in left_out]
        return members[0] if len(members) == 1 else {"anyOf": members}
    schema: dict[str, Any] = _without_titles(TypeAdapter(hint).json_schema())
    return schema


@click.command()
@debug_option
def schema() -> None:
    """Print the JSON schema of configs, for editors."""
    click.echo(schema_text(), nl=False)


def schema_text() -> str:
    """Return the JSON schema of configs as text."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"
