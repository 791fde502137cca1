"""Each promise of SECURITY.md names tests that exist, and its links lead somewhere."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "SECURITY.md").read_text()
TESTS = sorted(set(re.findall(r"`([\w/]+\.py::\w+)`", PAGE)))


@pytest.mark.parametrize("name", TESTS)
def test_a_named_test_exists(name: str) -> None:
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row.split("|")[2].strip() != "test"]
    assert len(promises) >= 12
    assert all("::test_" in row for row in promises)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGE):
        assert (ROOT / target).exists(), target
