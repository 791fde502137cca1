"""Files of chosen samples: every format gives back what was chosen, and faults are one line.

Shapes: N samples, M chosen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprune.core import Selection
from rayprune.sources.selection_files import read_selection_file, write_selection_file

ENDINGS = [".parquet", ".npz", ".txt", ".tsv"]
BEYOND_FLOAT32 = (1 << 24) + 1
CHOSEN = Selection.of_ids([7, 2, BEYOND_FLOAT32], 1 << 25, weights=[1 / 3, 0.0, 2.5])
ABOUT = {"by": "loss", "rule": "top", "note": "é\n#"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_written_comes_back(tmp_path: Path, ending: str) -> None:
    file = write_selection_file(tmp_path / f"chosen{ending}", CHOSEN, "ab", ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    stored = read_selection_file(file, 1 << 25)
    assert stored.ids.dtype == np.int64
    assert stored.ids.tolist() == CHOSEN.ids.tolist()
    assert stored.weights.dtype == np.float32
    assert np.array_equal(stored.weights, CHOSEN.weights)
    assert (stored.num_samples, stored.fingerprint, dict(stored.about)) == (1 << 25, "ab", ABOUT)
    again = stored.selection(1 << 25)
    assert np.array_equal(again.codes, CHOSEN.codes)
    assert again.requested == pytest.approx(1 - 3 / (1 << 25))


@pytest.mark.parametrize("ending", [*ENDINGS, ".npy"])
def test_weights_of_1_and_no_facts_come_back(tmp_path: Path, ending: str) -> None:
    file = write_selection_file(tmp_path / f"chosen{ending}", Selection.of_ids([3, 1], 5))
    stored = read_selection_file(file)
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([1, 3], [1.0, 1.0])
    assert (stored.fingerprint, dict(stored.about)) == (None, {})
    assert stored.num_samples == (None if ending == ".npy" else 5)


def test_ids_alone_have_no_place_for_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place for weights"):
        write_selection_file(tmp_path / "chosen.npy", CHOSEN)
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_of_ids_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_bytes(b"# mine: 3 hard ones\r\n\r\n12\r\n3\r\n0\r\n\r\n")
    stored = read_selection_file(file)
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([0, 3, 12], [1.0, 1.0, 1.0])
    file.write_text("3\t0.5\n1\t2\n")
    stored = read_selection_file(file)
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([1, 3], [2.0, 0.5])


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [4, 1], "name": ["a", "b"]}), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", ids=np.array([4, 1], dtype=np.uint8), weights=np.array([1, 3]))
    np.save(tmp_path / "a.npy", np.array([4, 1], dtype=np.uint64))
    weights = [read_selection_file(tmp_path / f"a{ending}").weights.tolist() for ending in (".parquet", ".npz", ".npy")]
    assert weights == [[1, 1], [3, 1], [1, 1]]


IDS_AND_WEIGHTS: list[tuple[Any, Any, str]] = [
    ([1, 2, 1], None, r"ids \[1\] repeat"),
    ([1, -2], None, "id -2 is out of range"),
    ([1, 9], None, r"ids \[9\] are out of range: ids go from 0 to 8"),
    ([1.0, 2.0], None, "whole number"),
    ([], None, "no ids|whole number"),
    ([1, 2], [1.0, -0.5], "row 1 has -0.5"),
    ([1, 2], [float("nan"), 1.0], "row 0 has nan"),
    ([1, 2], [1e300, 1.0], "row 0 has 1e"),
]


@pytest.mark.parametrize("ending", [*ENDINGS, ".npy"])
@pytest.mark.parametrize(("ids", "weights", "said"), IDS_AND_WEIGHTS)
def test_bad_ids_and_weights_are_refused(tmp_path: Path, ending: str, ids: Any, weights: Any, said: str) -> None:
    file = tmp_path / f"chosen{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"id": ids} if weights is None else {"id": ids, "weight": weights}), file)
    elif ending == ".npz":
        np.savez(file, ids=ids, **({} if weights is None else {"weights": weights}))
    elif ending == ".npy":
        if weights is not None:
            return
        np.save(file, ids)
    else:
        rows = ids if weights is None else [f"{number}\t{weight}" for number, weight in zip(ids, weights, strict=True)]
        file.write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(ValueError, match=said) as refused:
        read_selection_file(file, 9)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"1", r"ends in '\.csv': end it in one of \.parquet, \.npz, \.txt, \.tsv, \.npy"),
        ("a", b"1", "ends in 'nothing'"),
        ("a.parquet", b"PAR1", "no Parquet file"),
        ("a.npz", b"PK", "no readable .npz"),
        ("a.npy", b"\x93NUMPY", "no readable .npy"),
        ("a.txt", b"1 2\n", "a line must be a whole number"),
        ("a.txt", b"1\t2\t3\n", "a line must be a whole number"),
        ("a.txt", b"1\tx\n", "a line must be a whole number"),
        ("a.txt", b"1\n2\t3\n", "a line must be a whole number"),
        ("a.txt", b"99999999999999999999\n", "a line must be a whole number"),
        ("a.txt", b"\xff\xfe\n", "a line must be a whole number"),
        ("a.txt", b"# num_samples: five\n1\n", "damaged num_samples"),
        ("a.txt", b"# schema: [1]\n1\n", "damaged schema"),
        ("a.txt", b"# about: 3\n1\n", "damaged about"),
        ("a.txt", b"# schema: 2\n1\n", "upgrade rayprune"),
        ("a.txt", b"# num_samples: 5\n7\n", "out of range"),
        ("a.txt", b"# num_samples: 5\n3\n", "chosen among 5 samples, not 9"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        read_selection_file(tmp_path / name, 9)
    assert "\n" not in str(refused.value)


def test_other_things_are_told_from_a_selection(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_selection_file(tmp_path / "none.parquet")
    scores = pa.table({"id": [0], "loss": [1.0]}).replace_schema_metadata({"rayprune": json.dumps({"schema": 1})})
    pq.write_table(scores, tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="holds scores, not a choice"):
        read_selection_file(tmp_path / "scores.parquet")
    np.savez(tmp_path / "other.npz", images=np.zeros(1))
    with pytest.raises(ValueError, match="no array 'ids', only images"):
        read_selection_file(tmp_path / "other.npz")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no readable \.npy"):
        read_selection_file(tmp_path / "objects.npy")
    np.save(tmp_path / "ids.npy", np.arange(3))
    (tmp_path / "ids.npy").rename(tmp_path / "ids.npz")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        read_selection_file(tmp_path / "ids.npz")


def test_a_selection_among_other_data_is_refused(tmp_path: Path) -> None:
    stored = read_selection_file(write_selection_file(tmp_path / "a.npz", Selection.of_ids([1], 5)))
    with pytest.raises(ValueError, match="chosen among 5 samples, not 6"):
        stored.selection(6)
    (tmp_path / "b.txt").write_text("1\n8\n")
    with pytest.raises(ValueError, match=r"ids \[8\] are out of range"):
        read_selection_file(tmp_path / "b.txt").selection(6)


@pytest.mark.parametrize("ending", [*ENDINGS, ".npy"])
def test_nothing_half_written_is_left(tmp_path: Path, ending: str) -> None:
    file = write_selection_file(tmp_path / f"a{ending}", Selection.of_ids([1], 5))
    before = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_selection_file(file, Selection.of_ids([2], 5))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="create it first"):
        write_selection_file(tmp_path / "none" / "a.npz", CHOSEN)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_selection_file(tmp_path / "folder.npz", CHOSEN)
