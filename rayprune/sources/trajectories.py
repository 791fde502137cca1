"""Trajectories that another program logged: a folder of logits, an epoch a file, read in pieces.

The layout is the one of the TDDS reference program: for each epoch E, numbered from 0 or 1 without gaps,

    E_Output.npy  (N, C) float32 or float64 logits
    E_Index.npy   (N,) integers: the sample id, 0 … N−1, of each row, in any order
    E_Loss.npy    (N,) losses; may be left out

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

Piece = tuple[int, NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]

_PIECE_NUMBERS = 1 << 21  # logits turned to probabilities at once: 16 MiB in float64


@dataclass(frozen=True)
class _Epoch:
    """One epoch's files, their number in the folder and what stands in them, memory-mapped."""

    number: int
    logits_NC: NDArray[Any]
    ids: NDArray[np.int64]
    losses: NDArray[Any] | None


def read_trajectories(folder: str | Path, num_epochs: int, num_samples: int | None = None) -> Iterator[Piece]:
    """Read the first epochs of a folder of logits as probabilities, in pieces of some thousand rows.

    Everything but the logits' values is checked before the first piece.

    Args:
        folder: where the files are.
        num_epochs: T, how many epochs to read, at least 1.
        num_samples: N of the data set; by default that of the first epoch.

    Returns:
        An iterator over (epoch from 0, (B,) int64 ids, (B, C) float32 probabilities, (B,) float32 losses or None).

    Raises:
        ValueError: files are missing or damaged, there are fewer epochs, logits are float16 or (while reading) NaN or
            infinite, ids repeat, are missing or no integers, or N or C differ.
    """
    root = Path(folder).expanduser()
    epochs = []
    for number in _epoch_numbers(root, num_epochs):
        epochs.append(_open_epoch(root, number, num_samples))
        num_samples = epochs[0].ids.size
        if (classes := epochs[-1].logits_NC.shape[1]) != (before := epochs[0].logits_NC.shape[1]):
            raise DataError(f"{root / f'{number}_Output.npy'} has {classes} classes, and the first epoch {before}")
    return _pieces(root, epochs)


def _epoch_numbers(root: Path, num_epochs: int) -> range:
    """Return the numbers of the epochs to read."""
    found = {match[1] for path in root.glob("*_Output.npy") if (match := re.fullmatch(r"(\d+)_Output\.npy", path.name))}
    if not found:
        raise DataError(f"{str(root)!r} holds no 0_Output.npy, 1_Output.npy, …: give the folder of the logged logits")
    numbers = sorted(map(int, found))
    gaps = sorted(set(range(numbers[0], numbers[-1])) - set(numbers))
    if gaps and gaps[0] < numbers[0] + num_epochs:
        raise DataError(f"{root / f'{gaps[0]}_Output.npy'} is missing: every epoch from {numbers[0]} on is needed")
    if len(numbers) < num_epochs:
        cure = f"set trajectory_len to {len(numbers)} or less, or log more epochs"
        raise DataError(f"{str(root)!r} holds {len(numbers)} epochs, {num_epochs} are needed: {cure}")
    return range(numbers[0], numbers[0] + num_epochs)


def _open_epoch(root: Path, number: int, num_samples: int | None) -> _Epoch:
    """Map an epoch's files and check what can be told without reading the logits."""
    logits = _mapped(path := root / f"{number}_Output.npy")
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
        losses = _mapped(path)
        if losses.shape != (num_samples,) or losses.dtype.kind != "f":
            raise DataError(f"{path} is {losses.dtype} of shape {losses.shape}: it must be {num_samples} losses")
    return _Epoch(number, logits, ids, losses)


def _checked_ids(path: Path, num_samples: int) -> NDArray[np.int64]:
    index = _mapped(path)
    if index.dtype.kind not in "iu":
        raise DataError(f"{path} is {index.dtype}: sample ids must be integers, which floats are not above 2^24")
    if index.shape != (num_samples,):
        raise DataError(f"{path} is of shape {index.shape}: it must be ({num_samples},), an id for each row")
    outside = index[(index < 0) | (index >= num_samples)]
    if outside.size:
        raise DataError(f"{path} holds id {outside[0]}: ids of {num_samples} samples are 0 … {num_samples - 1}")
    ids = index.astype(np.int64)
    counts = np.bincount(ids, minlength=num_samples)
    if (counts != 1).any():
        twice, missing = np.flatnonzero(counts > 1)[:5].tolist(), np.flatnonzero(counts == 0)[:5].tolist()
        cure = "log every sample once an epoch (samplers of several workers pad)"
        raise DataError(f"{path} holds ids {twice} twice and lacks ids {missing}: {cure}")
    return ids


def _mapped(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path} is missing: every epoch needs its _Output.npy and its _Index.npy")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no readable .npy file: {error}") from None
    return array


def _pieces(root: Path, epochs: list[_Epoch]) -> Iterator[Piece]:
    size = max(1, _PIECE_NUMBERS // max(1, epochs[0].logits_NC.shape[1]))
    for epoch, held in enumerate(epochs):
        for start in range(0, held.ids.size, size):
            rows = slice(start, start + size)
            logits_BC, ids = held.logits_NC[rows].astype(np.float64), held.ids[rows]
            bad = ~np.isfinite(logits_BC).all(axis=1)
            if bad.any():
                named = f"logits of ids {np.sort(ids[bad])[:5].tolist()} are NaN or infinite"
                cure = "a sample without a whole trajectory has no score: log a run that does not diverge"
                raise DataError(f"{root / f'{held.number}_Output.npy'}: {named}: {cure}")
            losses = None if held.losses is None else held.losses[rows].astype(np.float32)
            yield epoch, ids, _softmax(logits_BC), losses


def _softmax(logits_BC: NDArray[np.float64]) -> NDArray[np.float32]:
    shifted = logits_BC - logits_BC.max(axis=1, keepdims=True)
    np.exp(shifted, out=shifted)
    shifted /= shifted.sum(axis=1, keepdims=True)
    return shifted.astype(np.float32)
