"""Building the device, precision, network, optimizer, train step and learning rate of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rayprune.engine.train.build import (
    StepSettings,
    build_network,
    build_step,
    pick_device,
    pick_precision,
    rate_at,
    recorded_signals,
)
from rayprune.engine.train.preflight import input_spec
from rayprune.sources import open_data
from tests.support.runs import run_config

CPU = torch.device("cpu")
SOURCE = open_data("digits").train


def settings(folder: Path, **sections: Any) -> StepSettings:
    config = run_config(folder, **sections)
    return StepSettings.of(config.build_method(), config)


def test_without_a_gpu_everything_is_full_precision_on_the_cpu() -> None:
    assert pick_device(use_gpu=False) == CPU
    assert pick_precision("auto", CPU) is None
    assert pick_precision("fp32", CPU) is None
    assert pick_precision("bf16", CPU) == torch.bfloat16


def test_a_network_is_seeded_and_images_are_channels_last(tmp_path: Path) -> None:
    config = run_config(tmp_path, model={"name": "resnet8"})
    spec = input_spec(config, SOURCE)
    first, second = (build_network(config, spec, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    convolutions = [value for value in first.values() if value.ndim == 4 and value.shape[1] > 1]
    assert convolutions
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in convolutions)
    other = build_network(run_config(tmp_path, model={"name": "resnet8"}, train={"seed": 1}), spec, CPU).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_method_and_the_config_may_not_name_different_steps(tmp_path: Path) -> None:
    dynams = {"name": "dynams", "proxy_width": 0.5}
    assert settings(tmp_path, method=dynams).name == "psp"
    with pytest.raises(ValueError, match=r"trains by its own step 'psp', and train.step is 'exits'"):
        settings(tmp_path, method=dynams, train={"step": "exits"})


def test_a_network_with_several_exits_gets_a_step_for_them(tmp_path: Path) -> None:
    plain, l2w = settings(tmp_path), settings(tmp_path, train={"step": "l2w"})
    assert plain.fit_to(1)[0] == "plain"
    assert plain.fit_to(3) == ("exits", {"num_exits": 3})
    assert l2w.fit_to(3)[0] == "l2w"
    with pytest.raises(ValueError, match=r"train.step l2w is for a network with several exits"):
        l2w.fit_to(1)


def test_recorded_signals_include_the_weights_of_each_exit(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"record": ["el2n"]})
    assert recorded_signals(config, input_spec(config, SOURCE)) == ("el2n",)
    model = {"name": "msdnet", "num_blocks": 2, "channels": 8, "growth_rate": 4}
    config = run_config(tmp_path, model=model, train={"step": "l2w", "record": ["el2n"]})
    assert recorded_signals(config, input_spec(config, SOURCE)) == ("el2n", "weight_exit_1", "weight_exit_2")


def test_a_compiled_step_keeps_the_names_in_checkpoints(tmp_path: Path) -> None:
    names: list[list[str]] = []
    for compiled in (False, True):
        config = run_config(tmp_path, train={"compile": compiled})
        spec = input_spec(config, SOURCE)
        chosen = StepSettings.of(config.build_method(), config)
        network = build_network(config, spec, CPU)
        build_step(config, network, spec, chosen, device=CPU)
        names.append(list(network.state_dict()))
    assert names[0] == names[1]


def test_the_rate_is_never_zero_and_follows_the_schedule(tmp_path: Path) -> None:
    config = run_config(tmp_path, train={"epochs": 4}, optim={"lr": 0.4, "schedule": "cosine", "warmup": 0.25})
    rates = [rate_at(config, epoch, step, 10, 1.0) for epoch in range(4) for step in range(10)]
    assert min(rates) > 0
    peak = rates.index(max(rates))
    assert max(rates) <= 0.4
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rate_at(config, 1, 3, 10, 0.5) == pytest.approx(rates[13] / 2)
