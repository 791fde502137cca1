"""Commands in a folder of someone else's: nothing of it is imported that the user has not named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import environment, rayprune
from tests.support.foreign_folder import imported, make_foreign, write_own


@pytest.mark.parametrize("command", [("report", "."), ("schema",)])
def test_no_file_of_the_current_folder_is_imported(tmp_path: Path, command: tuple[str, ...]) -> None:
    make_foreign(tmp_path)
    line = {"epoch": 0, "num_samples": 8, "samples_trained": 8, "pruned_fraction": 0.0, "val_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    code = f"{tmp_path}/secrets.py:X"
    config = {"method": {"name": code}, "model": {"name": code}, "train": {"step": {"name": code}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    done = rayprune(*command, cwd=tmp_path)
    assert (done.returncode, done.stderr, imported(tmp_path)) == (0, "", [])


def test_a_reference_to_the_current_folder_loads_and_libraries_stay_the_installed_ones(tmp_path: Path) -> None:
    make_foreign(tmp_path)
    done = rayprune("train", str(write_own(tmp_path)), "scaling.num_workers=0", cwd=tmp_path)
    assert (done.returncode, done.stderr, imported(tmp_path)) == (0, "", [])
    assert "full on own, net, in this process" in done.stdout


def test_processes_of_a_command_have_no_current_folder_on_their_path(tmp_path: Path) -> None:
    make_foreign(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {name: 'own_path:report_path'}\ntrain: {epochs: 1}\n")
    child = "import subprocess, sys\nprint('PATH', subprocess.check_output([sys.executable, '-c', %r], text=True))"
    (tmp_path / "own_path.py").write_text(child % "import sys, secrets; print(sys.path)")
    done = rayprune("train", "c.yaml", "scaling.num_workers=0", cwd=tmp_path)
    assert "own_path" in done.stderr  # it has no such function
    assert "PATH ['" in done.stdout
    assert repr(str(tmp_path)) not in done.stdout
    assert "['', " not in done.stdout
    assert imported(tmp_path) == []


def test_a_folder_on_pythonpath_stays_first(tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("print('the psutil of PYTHONPATH'); raise ImportError")
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    command = [sys.executable, "-m", "rayprune", "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment() | {"PYTHONPATH": path}
    )
    assert "the psutil of PYTHONPATH" in done.stdout
