"""Files of scores: written ones are read back, tables of other programs are read, and faults are one line.

Shapes: N samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayprune.errors import RunFolderError
from rayprune.sources.tables.scores import ScoreFile, read_scores, write_scores
from tests.support.sources import claim_rows

LOSS = np.array([0.5, np.nan, 2.0], dtype=np.float32)


def write(folder: Path, **more: Any) -> Path:
    about = {"method": {"name": "infobatch"}, "seed": 3}
    return write_scores(folder / "scores.parquet", 3, {"loss": LOSS}, fingerprint="ab", about=about, **more)


def parquet(folder: Path, columns: dict[str, Any], metadata: Any = None) -> Path:
    table = pa.table(columns)
    file = folder / "table.parquet"
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, file)
    return file


def test_written_scores_are_read_back(tmp_path: Path) -> None:
    labels, visits = np.array([1, 0, 1]), np.array([4, -1, 4], dtype=np.int32)
    extra = {"hard": np.array([True, False, True]), "text": ["a", "b", "c"]}
    file = write(tmp_path, labels=labels, extra=extra, last_visit=visits, times_pruned=np.array([0, 5, 0]))
    assert pq.read_schema(file).names == ["id", "label", "hard", "text", "loss", "last_visit", "times_pruned"]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    for path in (file, tmp_path):
        stored = read_scores(path)
        assert (stored.path, stored.num_samples, stored.fingerprint) == (file, 3, "ab")
        assert dict(stored.about) == {"method": {"name": "infobatch"}, "seed": 3}
        assert list(stored.scores) == ["hard", "loss", "last_visit", "times_pruned"]
        assert np.array_equal(stored.scores["loss"], LOSS, equal_nan=True)
        assert stored.scores["loss"].dtype == np.float32
        assert stored.labels is not None
        assert stored.labels.tolist() == [1, 0, 1]
        assert stored.ids.tolist() == [0, 1, 2]


def test_rows_are_sorted_by_id(tmp_path: Path) -> None:
    file = parquet(tmp_path, {"id": [2, 0, 1], "score": [0.2, 0.0, 0.1], "label": [7, 5, 6]})
    stored = read_scores(file)
    assert stored.scores["score"].tolist() == [0.0, 0.1, 0.2]
    assert stored.labels is not None
    assert stored.labels.tolist() == [5, 6, 7]
    assert stored.fingerprint is None
    assert stored.about == {}


def test_a_csv_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    file.write_text("id,name,score,times\n1,b,,3\n0,a,0.5,2\n")
    stored = read_scores(file)
    assert np.array_equal(stored.scores["score"], [0.5, np.nan], equal_nan=True)
    assert stored.scores["times"].tolist() == [2, 3]
    assert list(stored.scores) == ["score", "times"]
    assert stored.labels is None


def test_whole_numbers_with_gaps_are_scores_with_nan(tmp_path: Path) -> None:
    stored = read_scores(parquet(tmp_path, {"id": [0, 1], "events": pa.array([3, None])}))
    assert np.array_equal(stored.scores["events"], [3, np.nan], equal_nan=True)


def test_names_of_classes_are_not_labels(tmp_path: Path) -> None:
    assert read_scores(parquet(tmp_path, {"id": [0, 1], "label": ["a", "b"], "s": [1, 2]})).labels is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"number": [0, 1], "score": [1.0, 2.0]}, "no column 'id'"),
        ({"id": [0, 1]}, "no column of numbers"),
        ({"id": [0, 1], "name": ["a", "b"]}, "no column of numbers"),
        ({"id": [0.0, 1.0], "score": [1.0, 2.0]}, "ids must be whole numbers, got double"),
        ({"id": ["0", "1"], "score": [1.0, 2.0]}, "ids must be whole numbers, got string"),
        ({"id": pa.array([0, None]), "score": [1.0, 2.0]}, "1 empty ones"),
        ({"id": [0, 0], "score": [1.0, 2.0]}, r"repeated \[0\], missing \[1\]"),
        ({"id": [1, 2], "score": [1.0, 2.0]}, r"missing \[0\], outside \[2\]"),
        ({"id": [-1, 0], "score": [1.0, 2.0]}, r"missing \[1\], outside \[-1\]"),
        ({"id": pa.array([], pa.int64()), "score": pa.array([], pa.float32())}, "no rows"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_scores(parquet(tmp_path, columns))
    assert "\n" not in str(refused.value)


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "a.csv").write_text("id,score\n0\n1,2,3\n")
    messages = {
        "none.parquet": "does not exist",
        "": "let the run finish",
        "a.parquet": "not a Parquet",
        "a.csv": "not a CSV",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message) as refused:
            read_scores(tmp_path / name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"schema": 2}), "upgrade rayprune"),
        ("{", "damaged metadata"),
        ("[1]", "damaged metadata"),
        (json.dumps({"schema": "two"}), "damaged metadata"),
        (json.dumps({"schema": 1, "kind": "selection"}), "give the scores"),
    ],
)
def test_metadata_of_another_kind_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_scores(parquet(tmp_path, {"id": [0], "loss": [1.0]}, {"rayprune": text}))


def score_file(names: list[str], method: str | None = None) -> ScoreFile:
    about = {"method": {"name": method}} if method else {}
    return ScoreFile(Path("s"), 1, {name: np.zeros(1) for name in names}, about=about)


def test_the_default_score_is_the_methods_or_the_only_one() -> None:
    assert score_file(["loss", "last_visit", "times_pruned"]).score_name() == "loss"
    assert score_file(["loss", "el2n"], "el2n").score_name() == "el2n"
    assert score_file(["loss", "last_visit"]).score_name("last_visit") == "last_visit"
    with pytest.raises(ValueError, match="2 scores: name the one to use, one of loss, el2n"):
        score_file(["loss", "el2n"], "infobatch").score_name()
    with pytest.raises(ValueError, match="no scores"):
        score_file(["last_visit"]).score_name()
    with pytest.raises(ValueError, match="did you mean 'loss'"):
        score_file(["loss"]).score_name("los")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'loss' has 3 rows for 4 samples"):
        write_scores(tmp_path / "s.parquet", 4, {"loss": LOSS})
    with pytest.raises(ValueError, match="two columns of the scores are called 'loss'"):
        write(tmp_path, extra={"loss": LOSS})
    with pytest.raises(ValueError, match=r"there is no folder .*none, create it first"):
        write(tmp_path / "none")
    before = write(tmp_path).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq, "write_table", torn_write)
        with pytest.raises(OSError, match="disk full"):
            write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]
    assert (tmp_path / "scores.parquet").read_bytes() == before


def torn_write(table: pa.Table, file: Path, **options: Any) -> None:
    file.write_bytes(b"PAR1")
    raise OSError("disk full")


def test_a_flipped_bit_is_no_other_score(tmp_path: Path) -> None:
    scores = np.arange(1_000) + 0.123
    file = write_scores(tmp_path / "scores.parquet", 1_000, {"loss": scores})
    assert np.array_equal(read_scores(file).scores["loss"], scores)
    content = bytearray(file.read_bytes())
    content[content.index(b"rayprune") // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"scores\.parquet is not a Parquet file, or damaged .*: restore it"):
        read_scores(file)


def test_a_file_that_claims_too_many_rows_is_refused(tmp_path: Path) -> None:
    file = write_scores(tmp_path / "scores.parquet", 100_003, {"loss": np.zeros(100_003)})
    claim_rows(file, 100_003, 10**12)
    with pytest.raises(RunFolderError, match="claims 1,000,000,000,000 rows of 2 columns, 16000 GB, and"):
        read_scores(file)
    pq.write_table(pa.table({"id": [0, 10**12], "loss": [1.0, 2.0]}), file)
    with pytest.raises(RunFolderError, match=r"the 2 rows must hold each id of 0\.\.N-1 once: missing \[1\], outside"):
        read_scores(file)
