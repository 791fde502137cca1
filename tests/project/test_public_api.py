"""The public names of rayprune: one list for the running program, for type checkers and for editors."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rayprune
from rayprune import errors
from rayprune.methods import METHODS
from tests.support.paths import ROOT

PROGRAM = ROOT / "tests" / "support" / "public_program.py"


def typed_names() -> set[str]:
    """Return the names imported under TYPE_CHECKING in rayprune/__init__.py."""
    tree = ast.parse((ROOT / "rayprune" / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


def test_type_checkers_see_the_names_that_exist() -> None:
    classes = {cls.__name__ for cls in METHODS.values()}
    assert typed_names() | {"__version__"} == set(rayprune.__all__) | classes
    for name in rayprune.__all__:
        assert getattr(rayprune, name) is not None, name
    assert set(rayprune.__dir__()) == set(rayprune.__all__) | classes
    with pytest.raises(
        AttributeError, match=r"'rayprune' has no attribute 'Infobatch': did you mean rayprune\.InfoBatch\?"
    ):
        _ = rayprune.Infobatch  # type: ignore[attr-defined]


def test_public_errors_are_of_one_tree() -> None:
    public = [getattr(rayprune, name) for name in rayprune.__all__ if hasattr(errors, name)]
    assert len(public) == 9
    assert all(issubclass(error, rayprune.RaypruneError) for error in public)
    for error in (rayprune.ConfigError, rayprune.DataError, rayprune.RunFolderError, rayprune.ClusterError):
        assert issubclass(error, ValueError)


def test_the_program_uses_every_public_name() -> None:
    tree = ast.parse(PROGRAM.read_text())
    used = {ast.unparse(node).removeprefix("rayprune.") for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(rayprune.__all__) <= used


def test_mypy_accepts_the_program_and_refuses_wrong_calls(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    lines = {
        "import rayprune": "",
        "rayprune.InfoBatch(prune_ratio='half')": "arg-type",
        "rayprune.prune({}, rayprune.Full(), num_epochs=1, batch_sise=8)": "call-arg",
        "rayprune.Infobatch()": "attr-defined",
        "rayprune.local_loader({}, rayprune.Full(), 1, 8).epoch()": "attr-defined",
    }
    wrong.write_text("\n".join(lines))
    # A user's settings and a cache of their own, so that those of the project stay as they are.
    flags = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache' / 'user'}"]
    command = [sys.executable, "-m", "mypy", *flags, str(PROGRAM), str(wrong)]
    reported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    found = re.findall(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", reported.stdout, flags=re.MULTILINE)
    expected = [(str(number), code) for number, code in enumerate(lines.values(), 1) if code]
    assert [(Path(file).name, line, code) for file, line, code in found] == [("wrong.py", *one) for one in expected]


def test_the_package_ships_its_types() -> None:
    assert (ROOT / "rayprune" / "py.typed").exists()


def test_help_shows_a_whole_example() -> None:
    text = pydoc.plain(pydoc.render_doc(rayprune.prune))
    for part in ("def train_loop", "get_dataset_shard", "epoch.weigh(batch, losses)", "TorchTrainer(", ".fit()"):
        assert part in text, part
