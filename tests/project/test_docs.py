"""The README and docs/ are correct: links lead somewhere, commands, configs and YAML are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from rayprune.cli.main import cli
from rayprune.config import Config, load_config, make_config
from rayprune.config.shipped import shipped_configs
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# Words that the reader replaces.
PLACEHOLDER = re.compile(r"\b(CONFIG|RUN|NAME|FOLDER|PATH|DIR)\b|…")


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def commands(page: Path) -> list[str]:
    lines = [line for text in blocks(page, "") for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    return [line for line in lines if line.startswith("rayprune ")]


def configs_in(words: list[str]) -> list[str]:
    """Return the configs among a command's words: files, and names of shipped configs."""
    return [word for word in words if (word.endswith(".yaml") and "=" not in word) or word in shipped_configs()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        name, *words = shlex.split(command, comments=True)[1:]
        assert name in cli.commands, command
        parsed = cli.commands[name].make_context(name, list(words), resilient_parsing=False)
        assert isinstance(parsed, click.Context)
        configs = configs_in(words)
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        if any(PLACEHOLDER.search(word) for word in configs + overrides):
            continue
        for config in configs:
            assert isinstance(load_config(config, overrides), Config), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_is_valid(page: Path) -> None:
    for text in blocks(page, "yaml"):
        # Where lines show alternatives of one section, each line is a config of its own.
        parts = text.splitlines() if text.count("train: {") > 1 else [text]
        for part in parts:
            tree = yaml.safe_load(part)
            if not PLACEHOLDER.search(part):
                assert isinstance(make_config(tree), Config), part


def test_every_config_is_valid_and_starts_with_a_comment() -> None:
    files = shipped_configs().values()
    assert len(files) > 15
    for file in files:
        assert isinstance(load_config(file), Config)
        assert file.read_text().startswith("# "), file.name
