"""The command line as a whole: exit codes, one line for each mistake, and what it does not import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rayprune.cli import main as command_line
from tests.support.command_line import rayprune
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nope.yaml"], "nope.yaml"),
        (["train", "configs/digits_full.yaml", "train.epoch=3"], "'epochs'"),
        (["train", "configs/digits_full.yaml", "method.name=infobach"], "'infobatch'"),
        (["train", "configs/digits_full.yaml", "data.source=digit"], "'digits'"),
        (["train", "configs/digits_full.yaml", "model.name=resnet9"], "'resnet8'"),
        (["train", "configs/digits_full.yaml", "data.source=parquet", "data.path=/nowhere"], "/nowhere"),
        (["train", "train.epochs=3"], "no config"),
        (["methods", "infobach"], "'infobatch'"),
        (["trian"], "trian"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(words: list[str], message: str, tmp_path: Path) -> None:
    in_process = ["scaling.num_workers=0", "scaling.stream=local", f"run.storage_path={tmp_path}"]
    done = rayprune(*words, *(in_process if words[0] == "train" else []))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_before_and_after_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for words in (["--debug", "methods", "infobach"], ["methods", "infobach", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["rayprune", *words])
        with pytest.raises(ValueError, match="'infobatch'"):
            command_line.main()


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["train", "--help"], ["methods", "infobach"]])
def test_help_and_methods_load_nothing_slow(words: list[str]) -> None:
    slow = ["ray", "torch", "pandas", "matplotlib", "pydantic"]
    code = (
        f"import sys; sys.argv = ['rayprune', *{words}]\n"
        "from rayprune.cli.main import main\n"
        f"try:\n    main()\nfinally:\n    print('LOADED', sorted(set({slow}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
