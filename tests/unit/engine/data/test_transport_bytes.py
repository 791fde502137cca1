"""Bytes read from storage: counted for every planned row, fewer with pruning, and kept by checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayprune.config import Config
from rayprune.engine.data.batch import PlacedRows
from rayprune.engine.storage.checkpoint import checkpoint_path
from rayprune.engine.storage.run_folder import read_selection
from rayprune.engine.train.driver import RunResult, train
from rayprune.engine.train.metrics import BYTES, PADDED, MetricSums
from rayprune.sources import SampleSource, Schema, Splits, open_data
from tests.support.runs import run_config, user

NUM_SAMPLES, BATCH, EPOCHS = 120, 16, 3


class NpyFiles(SampleSource):
    """The first digits, one .npy file a sample."""

    def __init__(self, folder: str) -> None:
        self._folder, self._digits = Path(folder), open_data("digits", limit=NUM_SAMPLES).train

    def __len__(self) -> int:
        return NUM_SAMPLES

    @property
    def schema(self) -> Schema:
        return self._digits.schema

    @property
    def fingerprint(self) -> str:
        return self._digits.fingerprint

    @property
    def labels(self) -> np.ndarray:
        return self._digits.labels

    def write(self) -> int:
        """Write the files; return the size of one."""
        for sample, image in enumerate(self._digits.take(np.arange(NUM_SAMPLES))["image"]):
            np.save(self._folder / f"{sample}.npy", image)
        return (self._folder / "0.npy").stat().st_size

    def take(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        return self.read(ids)[0]

    def read(self, ids: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        files = [self._folder / f"{sample}.npy" for sample in ids]
        images = np.stack([np.load(file) for file in files])
        return {"image": images, "label": self.labels[ids]}, sum(file.stat().st_size for file in files)


def npy_files(path: str) -> Splits:
    """Return the files as both parts."""
    return Splits(NpyFiles(path), NpyFiles(path))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Return a folder of samples and the size of one."""
    folder = tmp_path_factory.mktemp("samples")
    return folder, NpyFiles(str(folder)).write()


def config_of(folder: Path, samples: Path, name: str = "run", **sections: Any) -> Config:
    base: dict[str, Any] = {
        "data": {"source": f"{__file__}:npy_files", "path": str(samples), "limit": None},
        "model": {"name": "mlp", "hidden": [8]},
        "method": {"name": "random_epoch", "prune_ratio": 0.5},
        "train": {"epochs": EPOCHS, "batch_size": BATCH, "validate_every": EPOCHS},
    }
    return run_config(folder, name, **{**base, **sections})


def bytes_of(result: RunResult) -> list[int]:
    return [line["bytes_read"] for line in result.metrics]


@pytest.mark.parametrize("prune_ratio", [0.0, 0.25, 0.75])
def test_bytes_are_those_of_the_planned_rows(tmp_path: Path, files: tuple[Path, int], prune_ratio: float) -> None:
    samples, size = files
    method = {"name": "random_epoch", "prune_ratio": prune_ratio}
    result = train(config_of(tmp_path, samples, method=method))
    kept = [read_selection(result.folder, epoch).num_kept for epoch in range(EPOCHS)]
    rows = [count + -count % BATCH for count in kept]
    validation = [0] * (EPOCHS - 1) + [NUM_SAMPLES + -NUM_SAMPLES % BATCH]
    assert bytes_of(result) == (size * np.cumsum(np.add(rows, validation))).tolist()
    assert kept[-1] == pytest.approx(NUM_SAMPLES * (1 - prune_ratio), abs=1)


def test_forward_only_rows_are_read_too(tmp_path: Path, files: tuple[Path, int]) -> None:
    samples, size = files
    looks, plain = (
        train(config_of(tmp_path, samples, f"{number}", method={"name": user("LowerHalf"), "looks": number}))
        for number in (BATCH, 0)
    )
    assert np.subtract(bytes_of(looks), bytes_of(plain)).tolist() == [0, size * BATCH, size * BATCH], "once, in epoch 1"


def test_a_resumed_run_continues_the_count(tmp_path: Path, files: tuple[Path, int]) -> None:
    samples, _ = files
    config = config_of(tmp_path, samples, run={"keep_checkpoints": 3})
    whole = bytes_of(train(config))
    shutil.rmtree(checkpoint_path(tmp_path / "run", EPOCHS))
    assert bytes_of(train(config)) == whole


def test_checkpoints_inside_an_epoch_keep_the_bytes_exactly() -> None:
    device, real = torch.device("cpu"), torch.tensor([True, False])
    signals, rows = {"loss": torch.ones(2), "correct": torch.ones(2)}, PlacedRows(torch.arange(2), torch.ones(2), real)
    sums = MetricSums(device)
    for _ in range(3):
        sums.add(signals, rows, real.numpy(), 2**50 + 1)
    stored = sums.total(1).tolist()
    again = MetricSums(device, stored=stored).total(1)
    assert int(again[BYTES]) == 3 * (2**50 + 1)
    assert MetricSums(device, stored=stored[:BYTES]).total(1).tolist() == [*stored[:BYTES], 0, 0, 0]
    assert int(again[PADDED]) == 3
