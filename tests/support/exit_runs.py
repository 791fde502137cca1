"""Runs of small networks with several exits, for the tests of their evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rayprune.config import Config
from rayprune.config.yaml import merge
from rayprune.engine.storage.checkpoint import write_checkpoint
from rayprune.engine.train.build import build_network
from rayprune.engine.train.driver import open_splits
from rayprune.engine.train.preflight import input_spec
from tests.support.runs import POSITION, run_config

HERE = Path(__file__).parent
LADDER = f"{HERE}/stepwise_model.py:ladder"
TOWER = f"{HERE}/multi_exit_models.py:tower"  # can't be computed exit by exit


def exits_config(tmp_path: Path, network: str = LADDER, **sections: dict[str, Any]) -> Config:
    """Return a run of three exits on 301 digits, a fifth of them held out."""
    base = {"data": {"hold_out": 0.2}, "model": {"name": network}}
    return run_config(tmp_path, **merge(base, sections))


def untrained_run(config: Config, epoch: int = 4, step: int = 0, **position: Any) -> Path:
    """Write a run folder whose network is as it was built, and return it."""
    splits = open_splits(config)
    network = build_network(config, input_spec(config, splits.train), torch.device("cpu"))
    folder = Path(config.run.storage_path) / str(config.run.name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    known = {**POSITION, "fingerprint": splits.train.fingerprint, "digest": config.digest(), **position}
    model = network.state_dict()
    write_checkpoint(folder, epoch, step, model=model, trainer={}, selector={}, position=known)
    return folder
