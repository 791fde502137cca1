"""What a disturbed run must share with the undisturbed one: everything that decides its result, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rayprune.engine.storage.checkpoint import newest_checkpoint
from rayprune.engine.storage.run_folder import read_metrics

_KEYS = ("kept", "samples_trained", "samples_padded", "train_loss", "val_loss", "val_accuracy", "plan_hash", "lr")


def differences(disturbed: Path, undisturbed: Path) -> list[str]:
    """Return what differs between two finished runs' folders, in words; nothing when they are equal."""
    return [
        *_different_epochs(read_metrics(disturbed), read_metrics(undisturbed)),
        *_different_weights(disturbed, undisturbed),
        *_different_scores(disturbed, undisturbed),
    ]


def _different_epochs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    if [line["epoch"] for line in ours] != [line["epoch"] for line in theirs]:
        return [f"epochs {[line['epoch'] for line in ours]} instead of {[line['epoch'] for line in theirs]}"]
    return [
        f"epoch {our['epoch']}: {key} {our[key]} instead of {their[key]}"
        for our, their in zip(ours, theirs, strict=True)
        for key in _KEYS
        if our[key] != their[key]
    ]


def _different_weights(disturbed: Path, undisturbed: Path) -> list[str]:
    ours, theirs = _weights(disturbed), _weights(undisturbed)
    if ours.keys() != theirs.keys():
        return ["the last checkpoints hold other tensors"]
    return [f"final {name} differs" for name in ours if not torch.equal(ours[name], theirs[name])]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder)
    if newest is None:
        return {}
    loaded: dict[str, torch.Tensor] = torch.load(newest / "model.pt", weights_only=True)
    return loaded


def _different_scores(disturbed: Path, undisturbed: Path) -> list[str]:
    if not (disturbed / "scores.parquet").exists():
        return ["there is no scores.parquet"]
    ours, theirs = (pd.read_parquet(folder / "scores.parquet") for folder in (disturbed, undisturbed))
    if list(ours) != list(theirs) or len(ours) != len(theirs):
        return ["scores.parquet has another shape"]
    counts = {name: int((ours[name].fillna(-1.0) != theirs[name].fillna(-1.0)).sum()) for name in ours}
    return [f"scores.parquet: {name} of {count} samples differs" for name, count in counts.items() if count]
