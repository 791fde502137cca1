"""Imports go one way: which layer may import what, read from the code by AST.

Imports inside functions, relative ones and `importlib.import_module("literal")` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rayprune"
COMMAND_LINE = {
    "cli",
    "__main__",
    "command_compare",
    "command_evaluate",
    "command_report",
    "command_select",
    "command_show",
    "command_sweep",
    "diagnosis",
    "display",
    "display_compare",
    "display_evaluate",
    "display_sweep",
}  # the modules that only the commands use
TORCH = {"torch", "torchvision"}
# Third-party packages that a layer never imports.
BANNED = {
    "core": {"ray", "pandas", "pydantic", "click", "rich", "matplotlib", "pyarrow", "PIL", "yaml"} | TORCH,
    "methods": {"ray", "pandas", "pydantic", "click", "rich", "matplotlib", "pyarrow", "PIL", "yaml"} | TORCH,
    "sources": {"ray"},
    "nn": {"ray"},
    "report": {"ray"} | TORCH,
    "config": {"ray"} | TORCH,
    "config_sections": {"ray"} | TORCH,
    "config_compare": {"ray"} | TORCH,
    "config_steps": {"ray"} | TORCH,
    "config_sweep": {"ray"} | TORCH,
    "config_trials": {"ray"} | TORCH,
    "overrides": {"ray"} | TORCH,
    "engine": set(),
    "cli": set(),
    "__init__": {"ray", "pydantic"} | TORCH,
}
# Packages that a layer imports inside functions only, so that importing the layer stays cheap.
LAZY = {"core": {"scipy", "sklearn"}, "methods": {"scipy", "sklearn"}, "cli": {"ray"} | TORCH}
# Parts of rayprune that a layer does not know.
ABOVE = {
    "core": {"methods", "sources", "nn", "engine", "report", "cli", "config"},
    "methods": {"sources", "nn", "engine", "report", "cli", "config"},
    "sources": {"methods", "nn", "engine", "report", "cli"},
    "nn": {"sources", "engine", "report", "cli"},
    "engine": {"cli", "report"},
    "report": {"engine", "nn", "cli"},
    "config": {"nn", "engine", "report", "cli"},
    "config_sections": {"methods", "sources", "nn", "engine", "report", "cli", "config"},
    "config_compare": {"sources", "nn", "engine", "report", "cli", "config"},
    "config_steps": {"methods", "sources", "nn", "engine", "report", "cli", "config"},
    "config_sweep": {"methods", "sources", "nn", "engine", "report", "cli", "config"},
    "config_trials": {"nn", "engine", "report", "cli"},
    "overrides": {"methods", "sources", "nn", "engine", "report", "cli", "config"},
}


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
    def part(self) -> str:
        """The part of rayprune that is imported, or ''."""
        return [*self.name.split("."), ""][1] if self.top == "rayprune" else ""


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


def violations(layer: str, imported: list[Import]) -> list[str]:
    """Say which imports a layer may not have."""
    found = []
    for item in imported:
        if item.top in BANNED.get(layer, {"ray"} | TORCH):
            found.append(f"{item.line}: {layer} imports {item.top}")
        if item.eager and item.top in LAZY.get(layer, set()):
            found.append(f"{item.line}: {layer} imports {item.top} outside a function")
        if item.part in ABOVE.get(layer, set()):
            found.append(f"{item.line}: {layer} imports rayprune.{item.part}")
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if part in COMMAND_LINE else part


def imports_in(path: Path) -> list[Import]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imports_of(ast.parse(path.read_text(encoding="utf-8")), package)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert violations(layer_of(path), imports_in(path)) == []


def test_the_layers_are_the_ones_that_have_rules() -> None:
    assert {"core", "methods"} <= {layer_of(path) for path in modules()} <= set(BANNED)


def test_only_the_engine_and_the_command_line_import_ray() -> None:
    importers = {layer_of(path) for path in modules() if any(item.top == "ray" for item in imports_in(path))}
    assert importers <= {"engine", "cli"}


@pytest.mark.parametrize(
    ("layer", "text", "expected"),
    [
        ("core", "import ray", "1: core imports ray"),
        ("core", "def f():\n    from torch.nn import functional", "2: core imports torch"),
        ("methods", "import scipy.stats", "1: methods imports scipy outside a function"),
        ("methods", "class A:\n    import sklearn", "2: methods imports sklearn outside a function"),
        ("core", "from ..methods import base", "1: core imports rayprune.methods"),
        ("core", "from .. import engine", "1: core imports rayprune.engine"),
        ("core", "from rayprune import methods", "1: core imports rayprune.methods"),
        ("nn", "import importlib\nlambda: importlib.import_module('ray.data')", "2: nn imports ray"),
        ("engine", "from rayprune.cli import main", "1: engine imports rayprune.cli"),
        ("cli", "if True:\n    import ray", "2: cli imports ray outside a function"),
        ("config", "from rayprune.engine import train", "1: config imports rayprune.engine"),
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
    code = "import sys, rayprune.engine.actor, rayprune.engine.stream, rayprune.sources; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "statement",
    ["import rayprune", "import rayprune.core", "import rayprune.methods", "dir(rayprune)"],
)
def test_a_fresh_interpreter_loads_nothing_heavy(statement: str) -> None:
    heavy = ["torch", "ray", "pydantic", "pandas", "scipy", "sklearn", "pyarrow", "matplotlib"]
    code = f"import sys, rayprune\n{statement}\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
