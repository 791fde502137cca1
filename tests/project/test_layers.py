"""Imports go one way: which layer may import what, and no circles; read from the code by AST.

Imports inside functions, relative ones and `importlib.import_module("literal")` count like any other; those for type
checkers alone are left out of the circles.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "rayprune"
TORCH = {"torch", "torchvision"}
COMMAND_LINE = {"click", "rich", "matplotlib", "jinja2"}
FILES = {"pandas", "pyarrow", "PIL", "yaml"}
# What each layer may import of rayprune, itself and `errors` aside.
_NUMPY = {"core"}
_BELOW_ENGINE = {"core", "methods", "config", "sources", "nn", "paths"}
_STORAGE = _BELOW_ENGINE
_SCORING = _STORAGE | {"engine.storage"}
_DATA = _SCORING | {"engine.scoring"}
_RUNNING = _DATA | {"engine.data"}
_LOOPS = _RUNNING | {"engine.cluster", "engine.local_ray", "engine.monitoring"}
_EXPERIMENTS = _LOOPS | {"engine.train"}
KNOWS: dict[str, set[str]] = {
    "core": set(),
    "methods": _NUMPY,
    "sources": _NUMPY | {"paths"},
    "nn": _NUMPY,
    "config": _NUMPY | {"methods", "paths"},
    "engine.storage": _STORAGE,
    "engine.scoring": _SCORING,
    "engine.data": _DATA,
    "engine.cluster": _RUNNING | {"engine.local_ray", "engine.monitoring"},
    "engine.local_ray": set(),
    "engine.monitoring": _RUNNING,
    "engine.user_loop": _LOOPS,
    "engine.train": _LOOPS,
    "experiments": _EXPERIMENTS,
    "report": {"core", "config", "sources", "paths"},
    "prompts": _NUMPY,
    "prompts.actor": _NUMPY | {"prompts"},
    "prompts.sampler": _NUMPY | {"prompts", "prompts.actor"},
    "cli": _EXPERIMENTS | {"experiments", "report", "testing"},
    "torch": _LOOPS | {"engine.user_loop"},
    "trainers": _DATA,
    **{name: {"trainers"} for name in ("accelerate", "huggingface", "lightning")},
    "testing": _NUMPY | {"methods"},
    "__main__": {"cli"},
    "paths": set(),
    "errors": set(),
}
KNOWS["__init__"] = set(KNOWS)
# Third-party packages that a layer never imports.
BANNED: dict[str, set[str]] = {
    "core": {"ray", "pydantic"} | TORCH | COMMAND_LINE | FILES,
    "methods": {"ray", "pydantic"} | TORCH | COMMAND_LINE | FILES,
    "sources": {"ray", "pydantic"} | COMMAND_LINE,
    "nn": {"ray", "pydantic"} | COMMAND_LINE | FILES,
    "config": {"ray"} | TORCH | COMMAND_LINE,
    "report": {"ray"} | TORCH,
    "trainers": {"ray", "pydantic"} | COMMAND_LINE | FILES,
    "prompts": {"ray", "pydantic"} | TORCH | COMMAND_LINE | FILES,
    "prompts.actor": {"pydantic"} | TORCH | COMMAND_LINE | FILES,
    "prompts.sampler": {"ray", "pydantic"} | TORCH | COMMAND_LINE | FILES,
    "errors": {"ray", "pydantic"} | TORCH,
    "testing": {"ray", "pydantic", "pytest", "hypothesis"} | TORCH | COMMAND_LINE | FILES,
    "__init__": {"ray", "pydantic"} | TORCH,
}
# Packages that a layer imports inside functions only, so that importing the layer stays cheap.
LAZY = {"core": {"scipy", "sklearn"}, "methods": {"scipy", "sklearn"}, "cli": {"ray"} | TORCH}
WITHOUT_RAY = {"core", "methods", "sources", "nn", "config", "report", "errors", "testing", "__init__", "__main__"}
WITHOUT_RAY |= {"paths", "prompts", "prompts.sampler"}


@dataclass(frozen=True)
class Import:
    """One imported dotted name and whether the import runs with the module."""

    name: str
    line: int
    eager: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]

    @property
    def layer(self) -> str:
        """The layer of rayprune that is imported, or ''."""
        return layer_of(self.name.split(".")[1:]) if self.top == "rayprune" and "." in self.name else ""


def imports_of(tree: ast.AST, package: str) -> list[Import]:
    """List what a module of the dotted `package` imports, however it does it."""
    return list(_walk(tree, package, eager=True))


def _walk(node: ast.AST, package: str, eager: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        yield from (Import(name, getattr(child, "lineno", 0), eager) for name in _names(child, package))
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, package, eager and not lazy)


def _names(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")
        base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
        module = ".".join(filter(None, [base, node.module]))
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def layer_of(parts: list[str]) -> str:
    """Return the layer of a module below rayprune, given by its parts; '' for a name of the package itself."""
    layers = (".".join(parts[:2]), parts[0])
    return next((layer for layer in layers if layer in KNOWS), "")


def violations(layer: str, imported: list[Import]) -> list[str]:
    """Say which imports a layer may not have."""
    found = []
    for item in imported:
        if item.top in BANNED.get(layer, set()):
            found.append(f"{item.line}: {layer} imports {item.top}")
        if item.eager and item.top in LAZY.get(layer, set()):
            found.append(f"{item.line}: {layer} imports {item.top} outside a function")
        if item.layer and item.layer not in KNOWS[layer] | {layer, "errors"}:
            found.append(f"{item.line}: {layer} imports rayprune.{item.layer}")
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> list[str]:
    return list(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_in(path: Path) -> list[Import]:
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), package_of(path))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(module_of(path))
    if layer:
        assert violations(layer, imports_in(path)) == []
    else:  # the package `engine` itself
        assert imports_in(path) == []


def test_every_layer_has_modules_and_every_module_a_layer() -> None:
    layers = {layer_of(module_of(path)) for path in modules() if module_of(path) != ["engine", "__init__"]}
    assert layers == set(KNOWS)


def test_only_engine_and_experiments_and_the_doctor_and_the_prompt_actor_import_ray() -> None:
    importers = {path for path in modules() if any(item.top == "ray" for item in imports_in(path))}
    assert {layer_of(module_of(path)) for path in importers}.isdisjoint(WITHOUT_RAY)
    assert {path.name for path in importers if layer_of(module_of(path)) == "cli"} == {"doctor.py"}


def graph() -> dict[str, set[str]]:
    """Return module → the modules that it imports, wherever in its code; imports for type checkers are left out."""
    names = {".".join(["rayprune", *module_of(path)]).removesuffix(".__init__"): path for path in modules()}
    found = {}
    for name, path in names.items():
        imported = (item.name for item in imports_of(without_type_checking(path), package_of(path)))
        # `from package import name` names a module of it, or something that the module defines.
        inner = (item if item in names else item.rpartition(".")[0] for item in imported)
        found[name] = {item for item in inner if item in names and item != name}
    return found


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def without_type_checking(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return tree


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of an import circle, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_modules_import_each_other() -> None:
    assert len(graph()) > 100
    assert circle(graph()) == []


def test_a_circle_is_seen() -> None:
    edges = graph()
    edges["rayprune.core.selection"].add("rayprune.core.selector")
    assert {"rayprune.core.selection", "rayprune.core.selector"} <= set(circle(edges))


@pytest.mark.parametrize(
    ("layer", "text", "expected"),
    [
        ("core", "import ray", "1: core imports ray"),
        ("core", "def f():\n    from torch.nn import functional", "2: core imports torch"),
        ("methods", "import scipy.stats", "1: methods imports scipy outside a function"),
        ("methods", "class A:\n    import sklearn", "2: methods imports sklearn outside a function"),
        ("core", "from ..methods import base", "1: core imports rayprune.methods"),
        ("core", "from .. import nn", "1: core imports rayprune.nn"),
        ("engine.storage", "from ..scoring import actor", "1: engine.storage imports rayprune.engine.scoring"),
        ("engine.train", "from ..user_loop.api import prune", "1: engine.train imports rayprune.engine.user_loop"),
        ("core", "from rayprune import methods", "1: core imports rayprune.methods"),
        ("nn", "import importlib\nlambda: importlib.import_module('ray.data')", "2: nn imports ray"),
        ("engine.data", "from rayprune.cli.main import main", "1: engine.data imports rayprune.cli"),
        ("cli", "if True:\n    import ray", "2: cli imports ray outside a function"),
        ("config", "from rayprune.engine import train", "1: config imports rayprune.engine.train"),
        ("prompts", "def f():\n    from . import actor", "2: prompts imports rayprune.prompts.actor"),
        ("prompts", "import ray", "1: prompts imports ray"),
    ],
)
def test_a_forbidden_import_is_seen(layer: str, text: str, expected: str) -> None:
    assert violations(layer, imports_of(ast.parse(text), f"rayprune.{layer}")) == [expected]


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        ("methods", "def f():\n    from scipy import stats"),
        ("methods", "from ..core import Selection\nfrom rayprune.core.table import chunks\nfrom .base import Method"),
        ("cli", "def f():\n    import ray"),
        ("core", "from . import selection"),
        ("core", "from .selection import Selection"),
    ],
)
def test_an_allowed_import_is_let_through(layer: str, text: str) -> None:
    assert violations(layer, imports_of(ast.parse(text), f"rayprune.{layer}")) == []


def test_the_score_actor_and_read_tasks_do_without_torch() -> None:
    """It would cost each of their processes 0.4 GB, and the first batch a second."""
    names = ["scoring.actor", "scoring.client", "data.batch", "data.transport", "data.ray_data"]
    code = f"import sys, {', '.join(f'rayprune.engine.{name}' for name in names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "import rayprune",
        "import rayprune.core",
        "import rayprune.methods",
        "import rayprune.prompts.sampler",
        "dir(rayprune)",
    ],
)
def test_a_fresh_interpreter_loads_nothing_heavy(statement: str) -> None:
    heavy = ["torch", "ray", "pydantic", "pandas", "scipy", "sklearn", "pyarrow", "matplotlib"]
    code = f"import sys, rayprune\n{statement}\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
