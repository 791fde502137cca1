"""The L2W-DEN step, built like `rayprune train` builds it, against the reference's traces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.engine.train.build import InputSpec, StepSettings, build_network, build_step
from rayprune.nn.augment import Augment
from rayprune.nn.steps import L2wStep
from tests.support.l2w_trace import L2wTrace
from tests.support.paths import GOLDEN, MULTI_EXIT_MODELS
from tests.support.runs import run_config

TINY, TRACE = (np.load(GOLDEN / f"l2w_meta_step_{name}.npz") for name in ("tiny_mlp", "trace_col"))
CPU = torch.device("cpu")
NET = {"hidden.0": "first_hidden_layer.fc", "output": "output_layer"}


def configured_step(tmp_path: Path, step: Mapping[str, Any], **model: Any) -> L2wStep:
    """Return the step that a run of this config trains with."""
    config = run_config(
        tmp_path,
        model={"name": f"{MULTI_EXIT_MODELS}:tower", "width": 8, "norm": False, "double": True, **model},
        method={"name": "full"},
        train={"step": {"name": "l2w", **step}},
        optim={"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4},
    )
    spec = InputSpec("features", (6,), 6, Augment(mean=(0.0,), std=(1.0,)))
    network = build_network(config, spec, CPU)
    settings = StepSettings.of(config.build_method(), config)
    l2w = build_step(config, network, spec, settings, device=CPU)
    assert isinstance(l2w, L2wStep)
    return l2w


def golden_step(tmp_path: Path, tag: str, **options: Any) -> L2wStep:
    """Return the step of a tag, with the golden initial parameters."""
    normalise, inputs, interval = tag.split("_")
    own = {"input": inputs, "normalise": normalise, "meta_interval": int(interval), "hidden": 16, "meta_lr": 1e-2}
    step = configured_step(tmp_path, {**own, "epsilon": 0.8 if normalise == "col" else 0.3, "p": 15, **options})
    start = "init/meta_both/" if inputs == "both" else "init/meta/"
    load(step.model, {name: TINY[f"init/net/{name}"] for name, _ in step.model.named_parameters()})
    load(step.weight_net, {name: TINY[start + golden_name(name)] for name, _ in step.weight_net.named_parameters()})
    return step


def load(module: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})


def golden_name(name: str) -> str:
    layer, _, kind = name.rpartition(".")
    return f"{NET[layer]}.{kind}"


def two_batches(step: L2wStep) -> list[dict[str, torch.Tensor]]:
    """Train on the golden batches at the cosine's rates; return each one's signals."""
    signals = []
    for index in range(2):
        for group in step.optimizer.param_groups:
            group["lr"] = 0.5 * 0.5 * (1 + math.cos(math.pi * index / 20))
        inputs, targets = torch.from_numpy(TINY["x"][index]), torch.from_numpy(TINY["y"][index])
        signals.append(step(inputs, targets, torch.ones(24)))
    return signals


def assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("gradient", ["jvp", "second_order"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_intermediate_value_is_the_references(tmp_path: Path, gradient: str, scope: str) -> None:
    step = golden_step(tmp_path, "col_loss_1", gradient=gradient, scope=scope)
    trace = L2wTrace(step)
    two_batches(step)
    assert len(trace.halves) == 4
    for index, half in enumerate(trace.halves):
        golden = {key.split("/", 1)[1]: TRACE[key] for key in TRACE.files if key.startswith(f"step{index}/")}
        for ours, theirs in [
            ("losses", "pseudo_losses"),
            ("pseudo_weights", "pseudo_weights"),
            ("pseudo_loss", "pseudo_loss"),
            ("meta_confidences", "meta_conf"),
            ("exits", "alloc"),
            ("meta_loss", "meta_loss"),
            ("weights", "real_weights"),
            ("loss", "real_loss"),
        ]:
            assert_close(half[ours], golden[theirs])
        for key in ("pseudo_params", "params_after"):
            for name, value in half[key].items():
                assert_close(value, golden[f"{key}/{name}"])
        for key in ("meta_grad", "meta_after"):
            for name, value in half[key].items():
                assert_close(value, golden[f"{key}/{golden_name(name)}"])


@pytest.mark.parametrize("gradient", ["jvp", "second_order"])
@pytest.mark.parametrize("tag", ["col_loss_1", "mat_loss_1", "row_loss_1", "mat_conf_1", "col_both_1", "mat_loss_100"])
def test_every_variant_ends_at_the_references_parameters(tmp_path: Path, tag: str, gradient: str) -> None:
    step = golden_step(tmp_path, tag, gradient=gradient)
    trace = L2wTrace(step)
    signals = two_batches(step)
    for name, value in step.model.named_parameters():
        assert_close(value.detach(), TINY[f"{tag}/net/{name}"])
    for name, value in step.weight_net.named_parameters():
        assert_close(value.detach(), TINY[f"{tag}/meta/{golden_name(name)}"])
    # The reference's record lacks its first half batch.
    halves = trace.halves
    weights = torch.cat([half["weights"] for half in halves])
    assert_close(weights[12:], TINY[f"{tag}/weights"])
    assert_close(torch.cat([half["losses"] for half in halves])[12:], TINY[f"{tag}/losses"])
    assert_close(torch.cat([half["logits"].softmax(2).amax(2).T for half in halves])[12:], TINY[f"{tag}/conf"])
    assert_close(
        np.mean([(half["losses"] * half["weights"]).mean(0).numpy() for half in halves], 0), TINY[f"{tag}/ce_loss"]
    )
    assert_close(np.mean([half["meta_loss"] for half in halves if "meta_loss" in half]), TINY[f"{tag}/meta_loss_avg"])
    recorded = torch.cat([torch.stack([part[f"weight_exit_{k}"] for k in (1, 2, 3)], 1) for part in signals])
    torch.testing.assert_close(recorded, weights.float())
