"""The commands of the README and docs/ run, page by page and from top to bottom.

They run in this process on 120 digits, so that a page takes seconds, and on an S3 server if they name one. Not run
here are sweep, compare and `ray job submit`, which tests/integration runs on a real Ray, and commands that name the
reader's own files.
"""

from __future__ import annotations

import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from rayprune.cli.main import cli
from rayprune.sources.tables.scores import write_scores
from tests.project.test_docs import PAGES, blocks, commands, configs_in
from tests.project.test_examples import load_example
from tests.support.object_store import object_store
from tests.support.paths import ROOT

SMALL = [
    "data.limit=120",
    "train.batch_size=40",
    "train.validate_every=50",
    "scaling.num_workers=0",
    "scaling.threads=1",
]
FEW_EPOCHS = {
    "digits_audit": ["train.epochs=8"],
    "digits_tdds": ["train.epochs=5", "method.trajectory_len=4", "method.window_size=3", "method.also=[]"],
    "digits_dynams": ["train.epochs=8"],
    "digits_dynams_psp": ["train.epochs=8"],
}
# runs/NAME is a run with several exits, except on the page that needs a scoring run.
NAMED = {"methods.md": ["configs/digits_tdds.yaml"]}
DEFAULT_NAMED = ["configs/digits_msdnet_l2w.yaml", "method.name=infobatch"]
OWN_RUN = re.compile(r"\bruns/(NAME|A|B|C|demo)\b")
SKIPPED = re.compile(r"^rayprune (sweep|compare) |/path/to|\bCONFIG\b|…|MY_SWEEP|runs/l2w-0|--device cuda")


def documented_commands() -> list[tuple[Path, list[str]]]:
    pages = [(page, [line for line in commands(page) if not SKIPPED.search(line)]) for page in PAGES]
    return [(page, lines) for page, lines in pages if lines]


def write_files(page: Path) -> None:
    """Write the Python code of a page that starts with the name of a file, such as `# my_models.py`."""
    for code in blocks(page, "python"):
        if name := re.match(r"# (\w+\.py)\n", code):
            Path(name[1]).write_text(code)


def shrink(words: list[str]) -> list[str]:
    """Return the words of a command with fewer samples and epochs."""
    if words[0] not in {"train", "score", "audit"}:
        return words
    names = {Path(word).stem for word in configs_in(words)}
    fewer = [override for name in names for override in FEW_EPOCHS.get(name, ["train.epochs=3"])]
    small = {override.partition("=")[0]: override for override in [*SMALL, *fewer]}
    return [word for word in words if word.partition("=")[0] not in small] + list(small.values())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    for folder in ("configs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    rows = [f"{id},{id % 7 / 7},{id % 3}" for id in range(120)]
    (tmp_path / "scores.csv").write_text("\n".join(["id,hardness,label", *rows]) + "\n")
    numbers = np.linspace(0.0, 1.0, 120)
    write_scores(tmp_path / "scores.parquet", 120, {"quality": numbers, "perplexity": numbers})
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def run(runner: CliRunner, words: list[str]) -> None:
    result = runner.invoke(cli, words)
    assert result.exit_code == 0, f"rayprune {' '.join(words)}:\n{result.output}\n{result.exception}"


@pytest.mark.parametrize(("page", "lines"), documented_commands(), ids=[page.name for page, _ in documented_commands()])
def test_commands_run(page: Path, lines: list[str], checkout: CliRunner) -> None:
    write_files(page)
    with object_store() if any("s3://" in line for line in lines) else nullcontext():
        run_all(page, lines, checkout)


def run_all(page: Path, lines: list[str], checkout: CliRunner) -> None:
    if any("noisy_digits.npz" in line for line in lines):
        load_example("noisy_digits").write("noisy_digits.npz")
    if any(OWN_RUN.search(line) for line in lines):
        run(checkout, shrink(["train", *NAMED.get(page.name, DEFAULT_NAMED), "run.name=NAME"]))
        for name in ("A", "B", "C", "demo/A"):
            (Path("runs") / name).parent.mkdir(exist_ok=True)
            (Path("runs") / name).symlink_to(Path("runs/NAME").resolve())
    for line in lines:
        run(checkout, shrink(shlex.split(line.replace("--keep 5000", "--keep 50"), comments=True)[1:]))
