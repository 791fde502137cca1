"""What a run refuses before it writes or starts anything, in one line with the cure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayprune.core import Plan, Selection
from rayprune.engine.train.driver import train
from rayprune.errors import TrainingStopped
from tests.support.runs import assert_same_run, run_config, same_weights, user

BEFORE = {
    "a batch that is mostly padding": (
        {"train": {"batch_size": 5000}},
        "train.batch_size 5000 would be mostly padding",
    ),
    "no whole batch": ({"train": {"batch_size": 302, "last_batch": "drop"}}, "more than the 301 training samples"),
    "momentum": ({"optim": {"momentum": 0, "nesterov": True}}, "[Nn]esterov"),
    "a saving out of reach": ({"method": {"name": "infobatch", "target_saving": 0.95}}, "target_saving 0.95 cannot be"),
    "an input the model can't take": ({"model": {"name": user("wants_rgb")}}, "can't take a batch of 2 × "),
    "a model without parameters": ({"model": {"name": user("without_parameters")}}, "has no parameters to train"),
    "no last layer": (
        {"model": {"name": user("ends_softly")}, "method": {"name": user("TrainsBy"), "sweeps": "boundary"}},
        r"can't train model '.*:ends_softly': .*not the output of an nn.Linear \(the output of its last one, '1'",
    ),
    "no last layer for a proxy": (
        {"model": {"name": user("ends_softly")}, "method": {"name": user("TrainsBy"), "train_step": "psp"}},
        "not the output of an nn.Linear",
    ),
    "a layer that no proxy slices": (
        {"model": {"name": user("with_slopes")}, "method": {"name": user("TrainsBy"), "train_step": "psp"}},
        r"'2' of the network \(PReLU\) can't be sliced for a proxy: set method.proxy_width=null",
    ),
    "a proxy of nothing": (
        {"method": {"name": user("TrainsBy"), "train_step": "psp", "width": 0.001}},
        "leaves no channel of layer 'layers.0', which has 256: use at least 0.004",
    ),
    "a compiled network with a proxy": (
        {"method": {"name": user("TrainsBy"), "train_step": "psp"}, "train": {"compile": True}},
        "train.compile = True: train step 'psp' cannot be compiled: leave it out",
    ),
    "an unknown train step": (
        {"method": {"name": user("TrainsBy"), "train_step": "spp"}},
        r"unknown train step 'spp' of method '.*': did you mean 'psp'\?",
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_mistake_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    sections, words = BEFORE[case]
    with pytest.raises(ValueError, match=words) as caught:
        train(run_config(tmp_path, **sections))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_network_goes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and called by dynamo, without the compiler itself, which takes long."""
    calls: list[str] = []

    def compiled(self: torch.nn.Module) -> None:
        calls.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    train_section = {"train": {"epochs": 2}, "method": {"name": "full"}}
    plain = train(run_config(tmp_path, "plain", **train_section))
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    train_section["train"]["compile"] = True
    traced = train(run_config(tmp_path, "traced", **train_section))
    assert calls == ["MLP"]
    assert_same_run(plain, traced)


def test_a_network_trains_together_with_its_proxy(tmp_path: Path) -> None:
    folders = {}
    for name, method in (("psp", {"train_step": "psp", "sweeps": "boundary"}), ("plain", {})):
        config = run_config(tmp_path, name, method={"name": user("TrainsBy"), **method}, optim={"lr": 0.1})
        result = train(config)
        assert result.metrics[-1]["val_accuracy"] > 0.5
        folders[name] = result.folder
    assert not same_weights(folders["psp"], folders["plain"])


def test_a_folder_without_its_config_is_still_known_by_its_checkpoints(tmp_path: Path) -> None:
    folder = train(run_config(tmp_path, train={"epochs": 2})).folder
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match="holds another run"):
        train(run_config(tmp_path, train={"epochs": 2}, optim={"lr": 0.001}))
    assert not (folder / "config.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.yaml", "garbage", r"config\.yaml can't be read"),
        ("config.yaml", "a: [1", r"config\.yaml can't be read"),
        ("metrics.jsonl", "garbage\n", r"metrics\.jsonl, line 1 is no JSON"),
    ],
)
def test_a_damaged_file_of_the_run_folder_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"epochs": 2})
    folder = train(config).folder
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        train(config)
    assert "\n" not in str(caught.value)


def test_a_file_where_a_folder_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"can't be written \(.*checkpoints: File exists\)"):
        train(run_config(tmp_path))


def test_a_folder_where_a_file_belongs_is_named(tmp_path: Path) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"can't be written \(.*metrics\.jsonl: Is a directory\)"):
        train(run_config(tmp_path))


HOLD = """
import fcntl, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_folder_takes_one_process_at_a_time(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"epochs": 2})
    folder = train(config).folder
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is training"):
            train(config)
        other.communicate()
    assert len(train(config).metrics) == 2


def test_samples_with_a_nan_are_named_as_they_occurred(tmp_path: Path) -> None:
    model = {"name": user("nan_rows"), "rows": 1}
    order = Plan.of_selection(Selection.full(301), 32, seed=1, epoch=0).order
    first = order[[0, 32, 64]].tolist()
    assert first != sorted(first)
    with pytest.raises(TrainingStopped, match=f"first sample ids .{first[0]}, {first[1]}, {first[2]}"):
        train(run_config(tmp_path, model=model, train={"max_nonfinite": 3, "seed": 1}))
