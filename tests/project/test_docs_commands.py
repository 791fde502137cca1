"""The commands of README and docs/ are run, page by page from top to bottom, as a reader would.

On 120 digits and in this process, so that a page takes seconds. Not run here: sweep, compare and `ray job submit`,
which tests/integration runs on a real Ray, and what names a reader's own files.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from rayprune.cli.main import cli
from tests.project.test_docs import PAGES, commands
from tests.support.paths import ROOT

SMALL = [
    "data.limit=120",
    "train.batch_size=40",
    "train.validate_every=50",
    "scaling.num_workers=0",
    "scaling.threads=1",
]
FEW_EPOCHS = {
    "digits_tdds.yaml": ["train.epochs=5", "method.trajectory_len=4", "method.window_size=3", "method.also=[]"],
    "digits_dynams.yaml": ["train.epochs=8"],
    "digits_dynams_psp.yaml": ["train.epochs=8"],
}
# What the pages do to runs/NAME takes a run with several exits, one page's a run with a scoring run.
NAMED = {"methods.md": ["configs/digits_tdds.yaml"]}
NAMED_ELSE = ["configs/digits_msdnet_l2w.yaml", "method.name=infobatch"]
ELSEWHERE = re.compile(r"^rayprune (sweep|compare) |/path/to|\bCONFIG\b|…|MY_SWEEP|runs/l2w-0|--device cuda")


def documented() -> list[tuple[str, list[str]]]:
    pages = [(page.name, [line for line in commands(page) if not ELSEWHERE.search(line)]) for page in PAGES]
    return [(name, lines) for name, lines in pages if lines]


def in_small(words: list[str]) -> list[str]:
    """Return a command's words with fewer samples and epochs."""
    if words[0] not in {"train", "score"}:
        return words
    files = {Path(word).name for word in words if word.endswith(".yaml")}
    fewer = [override for file in files for override in FEW_EPOCHS.get(file, ["train.epochs=3"])]
    small = {override.partition("=")[0]: override for override in [*SMALL, *fewer]}
    return [word for word in words if word.partition("=")[0] not in small] + list(small.values())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    rows = [f"{id},{id % 7 / 7},{id % 3}" for id in range(120)]
    (tmp_path / "scores.csv").write_text("\n".join(["id,hardness,label", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def run(runner: CliRunner, words: list[str]) -> None:
    done = runner.invoke(cli, words)
    assert done.exit_code == 0, f"rayprune {' '.join(words)}:\n{done.output}\n{done.exception}"


@pytest.mark.parametrize(("page", "lines"), documented(), ids=[page for page, _ in documented()])
def test_commands_run(page: str, lines: list[str], checkout: CliRunner) -> None:
    if any("runs/" in line for line in lines):
        run(checkout, in_small(["train", *NAMED.get(page, NAMED_ELSE), "run.name=NAME"]))
        for name in ("A", "B", "C", "demo/A"):
            (Path("runs") / name).parent.mkdir(exist_ok=True)
            (Path("runs") / name).symlink_to(Path("runs/NAME").resolve())
    for line in lines:
        run(checkout, in_small(shlex.split(line.replace("--keep 5000", "--keep 50"), comments=True)[1:]))
