"""Trajectories that another program logged: a folder with the logits of each epoch, read in pieces.

The layout is that of the TDDS reference program. For each epoch E, numbered from 0 or 1 without gaps:

    E_Output.npy  (N, C) float32 or float64 logits
    E_Index.npy   (N,) integers: the sample id, 0 … N−1, of each row, in any order
    E_Loss.npy    (N,) losses; optional

Shapes: N samples, C classes, B rows of a piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.errors import DataError
from rayprune.sources.arrays import map_array
from rayprune.sources.base import id_faults
from rayprune.sources.memory import rows_of

Piece = tuple[int, NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]

_PIECE_NUMBERS = 1 << 21  # logits turned into probabilities at once: 16 MiB in float64


@dataclass(frozen=True)
class _Epoch:
    """One epoch's memory-mapped arrays; its number begins the names of its files."""

    number: int
    logits_NC: NDArray[Any]
    ids: NDArray[np.int64]
    losses: NDArray[Any] | None


def read_trajectories(folder: str | Path, num_epochs: int, num_samples: int | None = None) -> Iterator[Piece]:
    """Read the first epochs of a folder of logits as probabilities, in pieces of some thousand rows.

    Everything but the values of the logits is checked before the first piece.

    Args:
        folder: of the files.
        num_epochs: T, how many epochs to read, at least 1.
        num_samples: N of the dataset; by default that of the first epoch.

    Returns:
        An iterator over (epoch from 0, (B,) int64 ids, (B, C) float32 probabilities, (B,) float32 losses or None).

    Raises:
        DataError: files are missing or damaged, there are fewer epochs, logits are float16 or (while reading) NaN or
            infinite, ids repeat, are missing or are not integers, or N or C differ.
    """
    root = Path(folder).expanduser()
    epochs: list[_Epoch] = []
    for number in _epoch_numbers(root, num_epochs):
        epochs.append(_open_epoch(root, number, num_samples))
        num_samples = epochs[0].ids.size
        num_classes, expected = epochs[-1].logits_NC.shape[1], epochs[0].logits_NC.shape[1]
        if num_classes != expected:
            raise DataError(
                f"{root / f'{number}_Output.npy'} has {num_classes} classes, and the first epoch {expected}: log "
                "one run"
            )
    return _pieces(root, epochs)


def _epoch_numbers(root: Path, num_epochs: int) -> range:
    matches = (re.fullmatch(r"(\d+)_Output\.npy", path.name) for path in root.glob("*_Output.npy"))
    numbers = sorted({int(match[1]) for match in matches if match})
    if not numbers:
        raise DataError(f"{str(root)!r} holds no 0_Output.npy, 1_Output.npy, …: give the folder of the logged logits")
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    if gaps and gaps[0] < numbers[0] + num_epochs:
        raise DataError(
            f"{root / f'{gaps[0]}_Output.npy'} is missing: restore it, as every epoch from {numbers[0]} on is needed"
        )
    if len(numbers) < num_epochs:
        cure = f"set trajectory_len to {len(numbers)} or less, or log more epochs"
        raise DataError(f"{str(root)!r} holds {len(numbers)} epochs, {num_epochs} are needed: {cure}")
    return range(numbers[0], numbers[0] + num_epochs)


def _open_epoch(root: Path, number: int, num_samples: int | None) -> _Epoch:
    """Map the files of an epoch and check everything but the values of the logits."""
    logits = _map_file(path := root / f"{number}_Output.npy")
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise DataError(f"{path} is of shape {logits.shape}: it must be (samples, classes), two or more classes")
    if logits.dtype == np.float16:
        raise DataError(f"{path} is float16, in which small probabilities become 0: log logits.float()")
    if logits.dtype not in (np.float32, np.float64):
        raise DataError(f"{path} is {logits.dtype}: logits must be float32 or float64")
    num_samples = num_samples or logits.shape[0]
    if logits.shape[0] != num_samples:
        cure = f"log each of the {num_samples} samples once an epoch, without padding or a dropped last batch"
        raise DataError(f"{path} has {logits.shape[0]} rows: {cure}")
    ids = _checked_ids(root / f"{number}_Index.npy", num_samples)
    losses = None
    if (path := root / f"{number}_Loss.npy").exists():
        losses = _map_file(path)
        if losses.shape != (num_samples,) or losses.dtype.kind != "f":
            raise DataError(f"{path} is {losses.dtype} of shape {losses.shape}: it must be {num_samples} losses")
    return _Epoch(number, logits, ids, losses)


def _checked_ids(path: Path, num_samples: int) -> NDArray[np.int64]:
    index = _map_file(path)
    if index.dtype.kind not in "iu":
        raise DataError(f"{path} is {index.dtype}: sample ids must be integers; floats are inexact above 2^24")
    if index.shape != (num_samples,):
        raise DataError(f"{path} is of shape {index.shape}: it must be ({num_samples},), an id for each row")
    if faults := id_faults(index, num_samples):
        cure = "log every sample once an epoch (samplers of several workers pad)"
        raise DataError(f"{path} must hold each id of 0..{num_samples - 1} once: {faults}: {cure}")
    return index.astype(np.int64)


def _map_file(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing: log an _Output.npy and an _Index.npy for every epoch")
    return map_array(path, str(path))


def _pieces(root: Path, epochs: list[_Epoch]) -> Iterator[Piece]:
    from scipy.special import softmax

    piece_rows = max(1, _PIECE_NUMBERS // epochs[0].logits_NC.shape[1])
    for position, epoch in enumerate(epochs):
        for start in range(0, epoch.ids.size, piece_rows):
            rows = np.arange(start, min(start + piece_rows, epoch.ids.size))
            logits_BC, ids = rows_of(epoch.logits_NC, rows).astype(np.float64), epoch.ids[rows]
            bad = ~np.isfinite(logits_BC).all(axis=1)
            if bad.any():
                fault = f"logits of ids {np.sort(ids[bad])[:5].tolist()} are NaN or infinite"
                cure = "a sample without a whole trajectory has no score: log a run that does not diverge"
                raise DataError(f"{root / f'{epoch.number}_Output.npy'}: {fault}: {cure}")
            losses = None if epoch.losses is None else rows_of(epoch.losses, rows).astype(np.float32)
            yield position, ids, softmax(logits_BC, axis=1).astype(np.float32), losses
