"""Files of selected samples: both formats return the selection, and faults are one line.

Shapes: N samples, M selected.
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
from rayprune.sources.tables.selections import (
    FORMATS,
    read_selection_file,
    read_selection_for,
    write_selection_file,
)
from tests.support.sources import make_source

BEYOND_FLOAT32 = (1 << 24) + 1
SELECTION = Selection.of_ids([7, 2, BEYOND_FLOAT32], 1 << 25, weights=[1 / 3, 0.0, 2.5])
ABOUT = {"by": "loss", "rule": "top", "note": "é\n#"}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_written_selection_is_read_back(tmp_path: Path, ending: str) -> None:
    file = write_selection_file(tmp_path / f"chosen{ending}", SELECTION, "ab", ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    stored = read_selection_file(file, 1 << 25)
    assert stored.ids.dtype == np.int64
    assert stored.ids.tolist() == SELECTION.ids.tolist()
    assert stored.weights.dtype == np.float32
    assert np.array_equal(stored.weights, SELECTION.weights)
    assert (stored.num_samples, stored.fingerprint, dict(stored.about)) == (1 << 25, "ab", ABOUT)
    again = stored.selection(1 << 25)
    assert np.array_equal(again.codes, SELECTION.codes)
    assert again.requested == pytest.approx(1 - 3 / (1 << 25))


@pytest.mark.parametrize("ending", FORMATS)
def test_a_selection_without_weights_and_metadata_is_read_back(tmp_path: Path, ending: str) -> None:
    stored = read_selection_file(write_selection_file(tmp_path / f"chosen{ending}", Selection.of_ids([3, 1], 5)))
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([1, 3], [1.0, 1.0])
    assert (stored.num_samples, stored.fingerprint, dict(stored.about)) == (5, None, {})


def test_a_text_file_of_ids_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_bytes(b"# mine: 3 hard ones\r\n\r\n12\r\n3\r\n0\r\n\r\n")
    stored = read_selection_file(file)
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([0, 3, 12], [1.0, 1.0, 1.0])
    file.write_text("3\t0.5\n1\t2\n")
    stored = read_selection_file(file)
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([1, 3], [2.0, 0.5])


@pytest.mark.parametrize(
    ("columns", "weights"),
    [({"name": ["a", "b"]}, [1, 1]), ({"weight": np.array([1, 3], np.uint8)}, [3, 1])],
)
def test_parquet_files_of_other_programs_are_read(
    tmp_path: Path, columns: dict[str, Any], weights: list[float]
) -> None:
    pq.write_table(pa.table({"id": np.array([4, 1], np.uint64), **columns}), tmp_path / "a.parquet")
    stored = read_selection_file(tmp_path / "a.parquet")
    assert (stored.ids.tolist(), stored.weights.tolist()) == ([1, 4], weights)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        ([1, 2, 1], None, r"ids \[1\] repeat"),
        ([1, -2], None, "id -2 is out of range"),
        ([1, 9], None, r"ids \[9\] are out of range: ids go from 0 to 8"),
        ([1.0, 2.0], None, "whole number"),
        ([], None, "no ids|whole number"),
        ([1, 2], [1.0, -0.5], "row 1 has -0.5"),
        ([1, 2], [float("nan"), 1.0], "row 0 has nan"),
        ([1, 2], [1e300, 1.0], "row 0 has 1e"),
        ([1, 2], [0.0, 0.0], "all weights are 0"),
    ],
)
def test_bad_ids_and_weights_are_refused(tmp_path: Path, ending: str, ids: Any, weights: Any, message: str) -> None:
    file = tmp_path / f"chosen{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"id": ids} if weights is None else {"id": ids, "weight": weights}), file)
    else:
        rows = ids if weights is None else [f"{number}\t{weight}" for number, weight in zip(ids, weights, strict=True)]
        file.write_text("".join(f"{row}\n" for row in rows))
    with pytest.raises(ValueError, match=message) as refused:
        read_selection_file(file, 9)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"1", r"ends in '\.csv': a selection, which rayprune select writes, ends in \.parquet or \.txt"),
        ("a.npz", b"PK", r"ends in '\.npz': a selection, which rayprune select writes, ends in \.parquet or \.txt"),
        ("a", b"1", "ends in 'nothing'"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
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
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_selection_file(tmp_path / name, 9)
    assert "\n" not in str(refused.value)


def test_files_that_hold_no_selection_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_selection_file(tmp_path / "none.parquet")
    scores = pa.table({"id": [0], "loss": [1.0]}).replace_schema_metadata({"rayprune": json.dumps({"schema": 1})})
    pq.write_table(scores, tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="holds scores, not a selection"):
        read_selection_file(tmp_path / "scores.parquet")
    pq.write_table(pa.table({"number": [0]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column 'id'"):
        read_selection_file(tmp_path / "other.parquet")
    pq.write_table(pa.table({"id": [0], "weight": ["heavy"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="weights must be numbers, got object"):
        read_selection_file(tmp_path / "text.parquet")


def test_a_selection_among_other_data_is_refused(tmp_path: Path) -> None:
    source = make_source([0, 1, 0, 1, 0])
    file = write_selection_file(tmp_path / "a.parquet", Selection.of_ids([1], 5), source.fingerprint)
    assert read_selection_for(str(file), source).ids.tolist() == [1]
    with pytest.raises(ValueError, match="was chosen on other data"):
        read_selection_for(str(file), make_source([1, 1, 0, 1, 0]))
    with pytest.raises(ValueError, match=r"method\.path is missing"):
        read_selection_for("", source)
    with pytest.raises(ValueError, match="chosen among 5 samples, not 6"):
        read_selection_file(file).selection(6)
    (tmp_path / "b.txt").write_text("1\n8\n")
    with pytest.raises(ValueError, match=r"ids \[8\] are out of range"):
        read_selection_file(tmp_path / "b.txt").selection(6)


@pytest.mark.parametrize("ending", FORMATS)
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, ending: str) -> None:
    file = write_selection_file(tmp_path / f"a{ending}", Selection.of_ids([1], 5))
    before = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_selection_file(file, Selection.of_ids([2], 5))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == before
    with pytest.raises(ValueError, match="create it first"):
        write_selection_file(tmp_path / "none" / f"a{ending}", SELECTION)
    (tmp_path / f"folder{ending}").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_selection_file(tmp_path / f"folder{ending}", SELECTION)
