"""The script of docs/five_minutes.md runs as it stands there, and so does the one that its diff gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project.test_docs import blocks
from tests.support.command_line import environment
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "five_minutes.md"
EPOCH = re.compile(r"epoch +(\d+): kept (\d+)%, saved (\d+)% so far, accuracy (\d+\.\d)%")


def epochs_in(text: str) -> dict[int, tuple[float, ...]]:
    """Return epoch → kept, saved so far, and accuracy, in percent."""
    return {int(epoch): tuple(map(float, numbers)) for epoch, *numbers in EPOCH.findall(text)}


def apply_diff(diff: str, text: str) -> str:
    """Apply the hunks of a diff without line numbers; each must match one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count(old) == 1, old
        text = text.replace(old, "".join(line[1:] for line in lines if line[0] in " +"))
    return text


@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=pytest.mark.scenario)])
def test_the_script_prunes_and_learns(on_ray: bool, tmp_path: Path) -> None:
    (script,), (diff,) = blocks(PAGE, "python"), blocks(PAGE, "diff")
    (tmp_path / "prune_digits.py").write_text(apply_diff(diff, script) if on_ray else script)
    # Ray Train writes its results below HOME.
    settings = {**environment(), "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "prune_digits.py"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    printed, documented = epochs_in(done.stdout + done.stderr), epochs_in(PAGE.read_text())
    assert list(printed) == list(range(1, 21))
    assert documented.keys() == {1, 2, 20}
    for epoch, numbers in documented.items():
        # Two workers add gradients in another order, and other processors round differently.
        assert printed[epoch] == pytest.approx(numbers, abs=4)
    assert min(kept for kept, *_ in printed.values()) < 70
