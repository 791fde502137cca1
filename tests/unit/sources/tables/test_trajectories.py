"""A folder of logits that another program logged: the pieces read from it, and the errors of damaged files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.engine.train.static_subset import score_trajectories
from rayprune.sources.tables import trajectories
from rayprune.sources.tables.trajectories import read_trajectories

NUM, CLASSES, EPOCHS = 7, 3, 4


def logits_of(epoch: int) -> NDArray[np.float32]:
    """Return (N, C) logits by id."""
    return np.random.default_rng(epoch).normal(scale=3, size=(NUM, CLASSES)).astype(np.float32)


def order_of(epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng(epoch + 100).permutation(NUM)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write whole trajectories, numbered from 0, with losses."""
    for epoch in range(EPOCHS):
        order = order_of(epoch)
        np.save(tmp_path / f"{epoch}_Output.npy", logits_of(epoch)[order])
        np.save(tmp_path / f"{epoch}_Index.npy", order)
        np.save(tmp_path / f"{epoch}_Loss.npy", order.astype(np.float32) / 10)
    return tmp_path


@pytest.mark.parametrize("piece", [1 << 21, 6])
def test_rows_are_probabilities_with_their_ids(folder: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "_PIECE_NUMBERS", piece)
    all_ids: dict[int, list[int]] = {}
    for epoch, ids, probs, losses in read_trajectories(folder, EPOCHS):
        assert (ids.dtype, probs.dtype) == (np.int64, np.float32)
        assert ids.size <= max(piece // CLASSES, 1)
        powers = np.exp(logits_of(epoch)[ids].astype(np.float64))
        np.testing.assert_allclose(probs, powers / powers.sum(axis=1, keepdims=True), rtol=1e-6)
        assert losses is not None
        np.testing.assert_allclose(losses, ids / 10, rtol=1e-6)
        all_ids.setdefault(epoch, []).extend(ids.tolist())
    assert all_ids == {epoch: order_of(epoch).tolist() for epoch in range(EPOCHS)}


def test_numbers_may_start_at_one_and_only_the_first_epochs_are_read(folder: Path) -> None:
    for epoch in reversed(range(EPOCHS)):
        for kind in ("Output", "Index", "Loss"):
            (folder / f"{epoch}_{kind}.npy").rename(folder / f"{epoch + 1}_{kind}.npy")
    (folder / "4_Index.npy").unlink()  # of epoch 3, which is not requested
    (folder / "1_Loss.npy").unlink()
    np.save(folder / "9_Output.npy", logits_of(9))  # the gap before it comes after the requested epochs
    pieces = list(read_trajectories(folder, 3))
    assert [epoch for epoch, *_ in pieces] == [0, 1, 2]
    assert [losses is None for *_, losses in pieces] == [True, False, False]
    np.testing.assert_array_equal(pieces[2][1], order_of(2))


def test_huge_logits_do_not_overflow(folder: Path) -> None:
    np.save(folder / "0_Output.npy", np.full((NUM, CLASSES), 1e30) * [1, -1, 1])
    probs = next(read_trajectories(folder, 1))[2]
    assert probs.tolist() == [[0.5, 0.0, 0.5]] * NUM


def replaced(name: str, array: Any) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array)


def removed(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (removed("1_Output.npy"), "1_Output.npy is missing: restore it"),
        (removed("2_Index.npy"), "2_Index.npy is missing"),
        (removed("3_Output.npy"), "holds 3 epochs, 4 are needed: set trajectory_len to 3 or less"),
        (removed(*(f"{epoch}_Output.npy" for epoch in range(4))), "holds no 0_Output.npy"),
        (replaced("1_Output.npy", logits_of(1).astype(np.float16)), "1_Output.npy is float16, in which small"),
        (replaced("1_Output.npy", logits_of(1).astype(np.int64)), "1_Output.npy is int64: logits must be float32"),
        (replaced("1_Output.npy", logits_of(1)[:6]), "1_Output.npy has 6 rows: log each of the 7 samples once"),
        (replaced("1_Output.npy", logits_of(1)[:, :2]), "1_Output.npy has 2 classes, and the first epoch 3"),
        (replaced("1_Output.npy", np.ones(NUM)), "1_Output.npy is of shape (7,): it must be (samples, classes)"),
        (replaced("1_Index.npy", np.arange(7.0)), "1_Index.npy is float64: sample ids must be integers"),
        (replaced("1_Index.npy", np.arange(6)), "1_Index.npy is of shape (6,): it must be (7,)"),
        (
            replaced("1_Index.npy", np.arange(1, 8)),
            "1_Index.npy must hold each id of 0..6 once: missing [0], outside [7]",
        ),
        (replaced("1_Index.npy", np.arange(-1, 6)), "missing [6], outside [-1]"),
        (replaced("1_Index.npy", [0, 0, 1, 2, 3, 5, 5]), "repeated [0, 5], missing [4, 6]"),
        (replaced("1_Loss.npy", np.ones(6)), "1_Loss.npy is float64 of shape (6,): it must be 7 losses"),
        (replaced("1_Index.npy", np.array([{}] * 7, dtype=object)), "1_Index.npy is truncated, or is not a .npy file"),
        (lambda folder: (folder / "1_Index.npy").write_bytes(b"torn") and None, "1_Index.npy is truncated, or is not"),
    ],
)
def test_damaged_files_are_named_before_any_logits_are_read(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read_trajectories(folder, EPOCHS)
    assert "\n" not in str(refused.value)


def test_nan_logits_are_named_by_id_and_epoch(folder: Path) -> None:
    logits = logits_of(2)
    logits[[4, 1], 0] = np.nan, np.inf
    np.save(folder / "2_Output.npy", logits[order_of(2)])
    with pytest.raises(ValueError, match=r"2_Output.npy: logits of ids \[1, 4\] are NaN or infinite"):
        list(read_trajectories(folder, EPOCHS))
    assert len(list(read_trajectories(folder, 2))) == 2


def test_scores_come_from_the_folder(folder: Path) -> None:
    method = {"name": "tdds", "trajectory_len": 4, "window_size": 3, "prune_ratio": 0.5}
    selector = score_trajectories(method, folder, NUM, labels=np.zeros(NUM, int))
    assert selector.epoch == 4
    assert np.isfinite(selector.scores()["tdds"]).all()
    assert selector.begin_epoch(4).num_kept == 4
    assert selector.begin_epoch(4).facts["class_kept"] == [round(4 / 7, 6)]
    control = score_trajectories({"name": "shuffled", "of": method}, folder, NUM, seed=1)
    assert control.begin_epoch(4).num_kept == 4


@pytest.mark.parametrize(
    ("method", "num_samples", "message"),
    [
        ({"name": "tdds"}, NUM, "holds 4 epochs, 10 are needed: set trajectory_len to 4 or less"),
        ({"name": "tdds", "trajectory_len": 3, "window_size": 3}, 8, "0_Output.npy has 7 rows: log each of the 8"),
        ("infobatch", NUM, "method 'infobatch' cannot score logged logits"),
    ],
)
def test_a_folder_that_does_not_fit_the_method_is_refused(
    folder: Path, method: Any, num_samples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        score_trajectories(method, folder, num_samples)
