"""`rayprune methods`: the list, and one method or train step."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from rayprune.cli.console import console
from rayprune.cli.methods import methods
from rayprune.methods import METHODS


def run(*words: str) -> str:
    """Run the command in this process; return what it printed, on one line."""
    done = CliRunner(env={"COLUMNS": "120"}).invoke(methods, words, catch_exceptions=False)
    assert done.exit_code == 0
    return " ".join(done.output.split())


def test_methods_are_listed_with_paper_and_defaults() -> None:
    assert "random_epoch" in run()
    assert "2303.04947" in run("infobatch")
    assert "anneal_start=0.875" in run("infobatch")
    assert "with AdamW, only the ratios of weights count" in run("infobatch")
    assert "AdamW" not in run("full")


def test_methods_say_in_a_line_what_they_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    listed = CliRunner().invoke(methods, catch_exceptions=False).output.splitlines()
    for name, method in METHODS.items():
        (line,) = [line for line in listed if line.strip() and line.split()[0].rstrip("*") == name]
        assert method.keeps in line
        assert line.rstrip().endswith(method().cost or "–")
        assert ("*" in line) == method().unbiased
        assert method.keeps
    assert "keeps all above the mean loss, some below" in run("infobatch")


def test_train_steps_are_listed_with_their_cost_and_their_gain() -> None:
    for printed in (run(), run("l2w")):
        assert "3.7" in printed
        assert "points" in printed
    assert "epsilon=0.8" in run("l2w")
