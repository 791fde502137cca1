"""The commands that docs/cluster.md prints for one machine, run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray.scripts.scripts import cli as ray_cli

from rayprune.cli.main import cli
from rayprune.engine.storage.run_folder import read_metrics
from tests.support.paths import ROOT

# The recipe uses Ray's default ports, and `ray stop` ends all Ray processes: both stay inside these namespaces.
NAMESPACES = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
LOOPBACK = "ip link set lo up"


def recipe() -> str:
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"To try it on one machine:\n\n```\n(.*?)```", page, flags=re.DOTALL)
    return str(block)


def test_the_commands_have_options_that_exist(tmp_path: Path) -> None:
    commands = [shlex.split(line, comments=True) for line in recipe().splitlines()]
    assert [words[:2] for words in commands] == [
        ["export", "RAY_AUTH_MODE=token"],
        ["ray", "get-auth-token"],
        ["ray", "start"],
        ["ray", "job"],
        ["ray", "stop"],
    ]
    for _, name, *options in commands[1:3]:
        ray_cli.commands[name].make_context(name, [word for word in options if word not in {">", "/dev/null"}])
    submit = commands[3][3:]
    split = submit.index("--")
    job = ray_cli.commands["job"].commands["submit"]  # type: ignore[attr-defined]
    job.make_context("submit", [*submit])  # it consumes its list
    assert submit[split + 1 : split + 3] == ["rayprune", "train"]
    assert (ROOT / submit[split + 3]).exists()
    done = CliRunner().invoke(cli, [*submit[split + 2 :], f"run.storage_path={tmp_path}", "model.name=none"])
    assert "twice" in str(done.exception), "run.storage_path is a key of the printed command"


@pytest.mark.scenario
@pytest.mark.parametrize("with_token", [False, True], ids=["no_token_file", "token_file"])
def test_the_commands_run_as_printed(tmp_path: Path, with_token: bool) -> None:
    if subprocess.run([*NAMESPACES, LOOPBACK], capture_output=True).returncode != 0:
        pytest.skip("this process may not create namespaces, which keep `ray stop` away from other tests")
    project, home = tmp_path / "project", tmp_path / "home"
    project.mkdir()
    (project / "configs").symlink_to(ROOT / "configs")
    home.mkdir()
    token = home / ".ray" / "auth_token"
    if with_token:
        token.parent.mkdir()
        token.write_text("0123456789abcdef" * 4)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="rp", ignore_cleanup_errors=True) as temporary:  # sockets need short paths
        environment = {**clean, **path, "HOME": str(home), "RAY_TMPDIR": temporary, "RAY_USAGE_STATS_ENABLED": "0"}
        script = f"{LOOPBACK}; set -ex\n{recipe()}"
        done = subprocess.run(
            [*NAMESPACES, script], cwd=project, env=environment, capture_output=True, text=True, timeout=400
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "succeeded" in done.stdout
    (run,) = (project / "runs").iterdir()
    assert read_metrics(run)[-1]["epoch"] == 19
    assert token.exists()
    assert with_token == (token.read_text() == "0123456789abcdef" * 4)
