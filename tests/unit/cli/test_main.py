"""The command line as a whole: exit codes, one line for each mistake, and what it does not import."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayprune.cli import main as command_line
from rayprune.cli.console import split_arguments
from tests.support.command_line import environment, loaded_modules, rayprune
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
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # `main` installs its handler for the rest of the process
    for words in (["--debug", "methods", "infobach"], ["methods", "infobach", "--debug"]):
        monkeypatch.setattr(sys, "argv", ["rayprune", *words])
        with pytest.raises(ValueError, match="'infobatch'"):
            command_line.main()


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["train", "--help"], ["methods", "infobach"]])
def test_help_and_methods_load_nothing_slow(words: list[str]) -> None:
    slow = ["ray", "torch", "pandas", "matplotlib", "pydantic"]
    assert loaded_modules(slow, *words)[1] == set()


def test_ctrl_c_during_the_imports_is_one_line_and_exit_130(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rayprune", "train", "configs/digits_full.yaml"]
    command += ["scaling.num_workers=0", f"run.storage_path={tmp_path}"]
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell ignores it
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=heed)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:  # each import prints a line
        lines.append(line)
        if line.endswith("torch.cuda\n") or "torch.version" in line:
            process.send_signal(signal.SIGINT)
            break
    lines += process.stderr.readlines()
    assert process.wait(60) == 130
    assert [line for line in lines if not line.startswith("import time:")] == ["stopped: the same command continues\n"]
    assert list(tmp_path.iterdir()) == []


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_a_config_may_have_an_equals_sign_in_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1.yaml").touch()
    assert split_arguments(["lr=1.yaml", "run.name=a.yaml"]) == (["lr=1.yaml"], ["run.name=a.yaml"])
    missing = ["lr=0.1/c.yaml", "a/lr=0.1/c", "lr=2.yaml"]  # named in the error, not taken for settings
    assert split_arguments([*missing, "data.path=x/c.yaml", "lr=2"]) == (missing, ["data.path=x/c.yaml", "lr=2"])
