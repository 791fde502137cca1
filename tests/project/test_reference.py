"""docs/reference: current, complete, and what it says about configs and methods holds."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import rayprune
import rayprune.sources
from rayprune.cli.schema import Key, all_choices, config_schema, keys_of
from rayprune.config import Config, load_config, make_config
from rayprune.config.schema import Augmentation
from rayprune.config.shipped import shipped_configs
from rayprune.config.yaml import read_yaml
from rayprune.methods import METHODS
from rayprune.testing import run_check
from tests.project.test_docs import blocks
from tests.support.paths import ROOT

REFERENCE = ROOT / "docs" / "reference"
CONFIGS = list(shipped_configs().values())


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def errors_in(tree: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(tree)]


VALIDATOR = Draft202012Validator(config_schema())


def test_the_pages_are_current() -> None:
    for path, text in generator().pages().items():
        assert path.read_text() == text, f"docs/reference/{path.name} is out of date: run `make docs` and commit it"


def test_every_key_has_a_meaning() -> None:
    sections = {name: keys_of(field.annotation) for name, field in Config.model_fields.items() if name != "method"}
    keys: dict[str, list[Key]] = {**sections, "data.augment": keys_of(Augmentation)}
    for section, choices in all_choices().items():
        keys |= {f"{section}: {name}": own for name, own in choices.own.items()}
        keys[section] = choices.shared
    assert sum(map(len, keys.values())) > 200
    assert [f"{section}.{key.name}" for section, of in keys.items() for key in of if not key.meaning.strip()] == []


def test_the_readme_and_the_comparison_of_all_name_every_method() -> None:
    readme = (ROOT / "README.md").read_text().partition("## Methods")[2]
    assert [name for name in METHODS if f"`{name}`" not in readme] == []
    compared = {
        method["name"] for method in load_config(ROOT / "configs" / "digits_methods.yaml").compare.method_configs
    }
    assert set(METHODS) - compared == {"full", "fixed", "rho", "shuffled"}


def test_every_key_and_every_public_name_is_on_its_page() -> None:
    config, api = (REFERENCE / "config.md").read_text(), (REFERENCE / "api.md").read_text()
    for name, method in METHODS.items():
        assert f"### method.name: {name}\n" in config
        assert all(f"| `{key.name}` |" in config for key in keys_of(method))
    for names in (rayprune.__all__, rayprune.sources.__all__):
        for name in set(names) - {"__version__", "testing", "SOURCES"}:
            assert f"### {name}\n" in api, name


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(config_schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_and_resolved_configs_fit_the_schema(path: Any) -> None:
    assert errors_in(read_yaml(path.read_text())) == []
    assert errors_in(read_yaml(load_config(path).to_yaml())) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"method": "infobatch"},
        {"method": {"name": "random", "prune_ratio": {"schedule": "linear", "end": 0.3}}},
        {"method": {"name": "examples/keep_hardest.py:KeepHardest", "prune_ratio": 0.3}},
        {"data": {"source": "my_source.py:stripes", "num_samples": 3}},
        {"data": {"source": "arrays", "path": "x", "limit": 3, "augment": {"crop": 1}}},
        {"model": {"name": "torchvision:resnet18", "weights": None}},
        {"train": {"step": {"name": "l2w", "p": 3}}},
        {"train": {"step": {"name": "examples/focal_step.py:FocalStep", "gamma": 1}}},
        {"train": {"step": "examples/focal_step.py:FocalStep"}},
        {"compare": {"methods": ["infobatch", {"name": "random"}]}},
    ],
)
def test_the_schema_accepts_what_a_config_accepts(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    make_config(tree)
    assert errors_in(tree) == []


@pytest.mark.parametrize(
    "tree",
    [
        {"methd": "infobatch"},
        {"method": "infobach"},
        {"method": {"name": "infobatch", "ratio": 0.3}},
        {"method": {"name": "random", "prune_ratio": {"schedule": "linear", "begin": 0.3}}},
        {"method": {"name": "random", "prune_ratio": 1.5}},
        {"train": {"epoch": 3}},
        {"train": {"epochs": 0}},
        {"train": {"step": {"name": "l2w", "eps": 3}}},
        {"data": {"augment": {"crpo": 1}}},
        {"optim": {"lr": "fast"}},
        {"compare": {"methods": ["infobach"]}},
    ],
)
def test_the_schema_refuses_what_a_config_refuses(tree: Any) -> None:
    with pytest.raises(rayprune.ConfigError):
        make_config(tree)
    assert errors_in(tree) != []


@pytest.mark.parametrize(
    "tree",
    [
        {"data": {"paht": "x"}},  # digits, the default source, has no keys
        {"data": {"source": "arrays", "paht": "x"}},
        {"model": {"name": "msdnet", "blocks": 3}},
    ],
)
def test_the_schema_refuses_unknown_keys_that_the_config_passes_on(tree: Any) -> None:
    make_config(tree)
    assert errors_in(tree) != []


def test_the_page_of_contracts_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    defined: dict[str, Any] = {"__name__": "contracts"}
    for code in blocks(REFERENCE / "contracts.md", "python"):
        exec(compile(code, "contracts.md", "exec"), defined)
    assert {"small", "TwoExits", "stripes", "check_method"} <= defined.keys()
    for check in ("picks", "state_columns", "selections"):
        run_check(check, defined["AboveTheMean"]())
