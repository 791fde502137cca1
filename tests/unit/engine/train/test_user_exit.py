"""Code of the user that calls exit() does not end the command as if all its work was done."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rayprune.engine.train.driver import train
from rayprune.errors import ConfigError, TrainingFailed
from tests.support.runs import run_config

AT_IMPORT = "import sys\nsys.exit(0)\n"
BY_SITE = "\nexit()\n"
IN_FACTORY = "def model(num_classes, input_shape):\n    raise SystemExit\n"
IN_EPOCH = """
import sys
from torch import nn

class Net(nn.Linear):
    steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.steps > 15:
            sys.exit(0)
        return super().forward(x.flatten(1))

def model(num_classes, input_shape):
    return Net(64, num_classes)
"""
DATA = """
import numpy as np

class Data:
    reads = 0

    def __len__(self):
        return 60

    def __getitem__(self, i):
        self.reads += 1
        if self.reads > 400:
            raise SystemExit("no more")
        return np.full(4, i, dtype=np.float32), i % 3

def data():
    return Data()
"""


@pytest.fixture(params=["Python's", "W&B's"])
def sys_exit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sys.exit`, which W&B replaces by its own."""
    if request.param == "W&B's":
        from wandb.sdk.lib.exit_hooks import ExitHooks

        for name in ("exit", "excepthook"):
            monkeypatch.setattr(sys, name, getattr(sys, name))  # set back after the test
        ExitHooks().hook()


@pytest.mark.usefixtures("sys_exit")
@pytest.mark.parametrize(
    ("code", "error", "line"),
    [
        (AT_IMPORT, ConfigError, 2),
        (BY_SITE, ConfigError, 2),
        (IN_FACTORY, ConfigError, 2),
        (IN_EPOCH, TrainingFailed, 11),
    ],
    ids=["import", "exit()", "factory", "second epoch"],
)
def test_a_model_that_exits_is_an_error(code: str, error: type[Exception], line: int, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(code)
    with pytest.raises(error, match=rf"net.py, line {line}, raised SystemExit.*remove the call of exit"):
        train(run_config(tmp_path, model={"name": f"{tmp_path}/net.py:model"}))


def test_a_data_set_that_exits_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "items.py").write_text(DATA)
    source = {"source": "torch_dataset", "dataset": f"{tmp_path}/items.py:data", "cache": "none", "limit": None}
    config = run_config(tmp_path, data=source, train={"epochs": 20})
    with pytest.raises((ConfigError, TrainingFailed), match=r"items.py, line 13, raised SystemExit\('no more'\)"):
        train(config)
