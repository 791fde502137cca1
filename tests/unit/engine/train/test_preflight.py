"""Invalid configs are refused in one line with the cure, before anything starts or is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rayprune.core import Plan, Selection
from rayprune.engine.train.driver import train
from rayprune.engine.train.preflight import check_sizes
from rayprune.errors import ConfigError, TrainingStopped
from tests.support.runs import assert_same_run, run_config, same_weights, user

BEFORE = {
    "a batch that is mostly padding": (
        {"train": {"batch_size": 5000}},
        "train.batch_size 5000 would be mostly padding",
    ),
    "no whole batch": ({"train": {"batch_size": 302, "last_batch": "drop"}}, "more than the 301 training samples"),
    "images smaller than their crop": (
        {"data": {"augment": {"resized_crop": 9}}},
        "resized_crop = 9 is more than the side of images of 8×8: set data.image_size=10",
    ),
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
    "vectors in shards": (
        {"method": {"name": "k_center", "score_epochs": 2}, "scaling": {"score_shards": 2}},
        "k_center compares the embedding of all samples in one place, and scaling.score_shards is 2: set",
    ),
    "an unknown train step": (
        {"method": {"name": user("TrainsBy"), "train_step": "spp"}},
        r"method '.*': unknown train step 'spp': did you mean 'psp'\?",
    ),
}


@pytest.mark.parametrize("case", BEFORE)
def test_a_mistake_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    sections, words = BEFORE[case]
    with pytest.raises(ValueError, match=words) as caught:
        train(run_config(tmp_path, **sections))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_checks_do_not_import_torchs_compiler(optimizer: str, tmp_path: Path) -> None:
    """It takes a second, and with workers the driver never needs it."""
    file = tmp_path / "it.yaml"
    file.write_text(run_config(tmp_path, optim={"name": optimizer}).to_yaml())
    program = """
import sys
from rayprune.config import load_config
from rayprune.engine.train.driver import check, open_splits
config = load_config(sys.argv[1])
check(config, open_splits(config))
print(len([name for name in sys.modules if name.startswith("torch._dynamo.")]), "torch.optim" in sys.modules)
"""
    command = [sys.executable, "-c", program, str(file)]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout == "0 True\n"


def test_a_compiled_network_trains_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_samples_with_a_nan_loss_are_named_in_order(tmp_path: Path) -> None:
    model = {"name": user("nan_rows"), "rows": 1}
    order = Plan.of_selection(Selection.full(301), 32, seed=1, epoch=0).order
    first = order[[0, 32, 64]].tolist()
    assert first != sorted(first)
    with pytest.raises(TrainingStopped, match=f"first sample ids .{first[0]}, {first[1]}, {first[2]}"):
        train(run_config(tmp_path, model=model, train={"max_nonfinite": 3, "seed": 1}))


def test_a_batch_that_no_memory_holds_is_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"batch_size": 256})
    check_sizes(config, 300, row_bytes=3 * 224**2)
    with pytest.raises(ConfigError, match=r"train\.batch_size 256 × 500\.0 MB a sample is 128\.0 GB a worker, and"):
        check_sizes(config, 300, row_bytes=500_000_000)
