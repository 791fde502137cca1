"""The GPU benchmark on a CPU and a few images: every figure is produced, its value is not checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_steps import union_length


def test_every_figure_is_produced(tmp_path: Path) -> None:
    data = {**gpu.write_random_arrays(tmp_path / "images", 96), "augment": {"crop": 4, "flip": True}}
    setting = gpu.Setting(
        torch.device("cpu"), data, "resnet8", 32, epochs=2, rounds=1, steps=3, repeats=1, workers=0,
        streams=("local", "device"),
    )  # fmt: skip
    figures = {figure.name: figure.values for figure in gpu.speed(setting, tmp_path)}
    assert list(figures) == [
        "resnet8, batch 32: plain loop, data on the device, samples/s",
        "resnet8, batch 32: engine, stream local, samples/s",
        "resnet8, batch 32: engine, stream device, samples/s",
        "engine, stream local ÷ plain loop",
        "engine, stream device ÷ plain loop",
        "idle share of the device in steps, stream device",
        "recording ÷ step, on the device's clock",
    ]
    assert all(values[0] > 0 for values in list(figures.values())[:5])
    assert 0 <= figures["idle share of the device in steps, stream device"][0] < 1


def test_accuracy_and_seconds_of_every_arm_are_produced(tmp_path: Path) -> None:
    setting = gpu.Setting(torch.device("cpu"), {"source": "digits", "limit": 301}, "mlp", 64, workers=0)
    figures = [figure.name for figure in gpu.to_accuracy(setting, tmp_path, 4, 1, optim={"lr": 0.02})]
    assert {"full, 4 epochs: accuracy, %", "infobatch, 4 epochs: seconds", "random_epoch, 4 epochs: seconds"} <= set(
        figures
    )
    assert any(name.startswith("full_time, ") for name in figures)


def test_without_a_gpu_it_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(gpu.figures()) == []
    assert capsys.readouterr().out == "gpu: skipped, there is no GPU that torch can use\n"


def test_overlapping_work_counts_once() -> None:
    assert union_length([]) == 0.0
    assert union_length([(0.0, 10.0), (2.0, 3.0), (9.0, 12.0), (20.0, 21.0)]) == 13.0
