"""Try a checkpoint before a run resumes from it: on a network, a train step and a Selector of its own.

Checksums show that a checkpoint is as it was written. Whether it fits the run shows only when it is applied, and the
run's own objects must not be left with half of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayprune.config import Config
from rayprune.core.selector import Selector
from rayprune.engine.storage.checkpoint import read_position, refusing, restore_selector
from rayprune.engine.storage.checkpoint_writer import load_state
from rayprune.engine.train.build import (
    InputSpec,
    SelectionSetup,
    StepSettings,
    build_network,
    build_step,
    recorded_signals,
)
from rayprune.engine.train.metrics import NUM_ENTRIES
from rayprune.errors import RunFolderError
from rayprune.sources import SampleSource


def new_selector(config: Config, source: SampleSource, setup: SelectionSetup, record: tuple[str, ...]) -> Selector:
    """Return a Selector of the run, without its state."""
    labels, run = np.asarray(source.labels), (len(source), setup.num_epochs, config.train.seed)
    return Selector(setup.method, *run, labels, chosen=setup.chosen, record=record)


def try_checkpoint(config: Config, source: SampleSource, spec: InputSpec, setup: SelectionSetup, folder: Path) -> None:
    """Apply a checkpoint to objects that are thrown away.

    Args:
        config, source, spec, setup: the run, its training data, its network's inputs and how it selects.
        folder: the checkpoint.

    Raises:
        RunFolderError: the checkpoint can't be applied; names it.
    """
    position, record = read_position(folder), recorded_signals(config, spec)
    selector = new_selector(config, source, setup, record)
    restore_selector(selector, folder)
    device, settings = torch.device("cpu"), StepSettings.of(setup.method, config, record)
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, spec, device)
        step = build_step(config, network, spec, settings, device=device, is_trial=True)
        load_state(folder, network, step, device)
        with refusing(folder):
            if not position["epoch"] - 1 <= selector.epoch <= position["epoch"]:
                raise RunFolderError(f"selector.npz is of epoch {selector.epoch}")
            if len(position["sums"]) not in (0, NUM_ENTRIES):
                raise RunFolderError(f"position.json has {len(position['sums'])} sums, not {NUM_ENTRIES}")
            for optimizer in (value for value in vars(step).values() if isinstance(value, torch.optim.Optimizer)):
                _try_optimizer(optimizer)


def _try_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Take a step without gradients' effect: `load_state_dict` does not compare the state with the parameters."""
    before = _names(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = _names(optimizer)
    for parameter, names in before.items():
        if not isinstance(parameter, torch.Tensor):
            raise RunFolderError(f"the optimizer's state has an entry {parameter!r} without a parameter")
        if names != after[parameter]:
            raise RunFolderError(f"the optimizer's state lacks {', '.join(sorted(after[parameter] - names))}")


def _names(optimizer: torch.optim.Optimizer) -> dict[Any, set[str]]:
    return {parameter: set(state) for parameter, state in optimizer.state.items()}
