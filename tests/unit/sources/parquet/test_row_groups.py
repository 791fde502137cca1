"""Parquet without a cache: the cache's rows, decoded from row groups; what is read is counted and not read twice.

Shapes: N samples, G groups.
"""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayprune.core import Plan, Selection
from rayprune.errors import DataError
from rayprune.sources import SampleSource, input_statistics, open_data
from rayprune.sources import cache as decoded
from rayprune.sources.parquet.row_groups import ParquetGroups
from tests.support.sources import encode_image, pixels

SIZE = (7, 5)
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> list[bytes]:
    """Return gray PNG images of noise."""
    return [encode_image(image) for image in pixels(count, (size[1], size[0]), 1, seed)]


def write_images(file: Path, images: list[Any], labels: list[Any], group_rows: int, struct: bool = True) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": image, "path": "a"} for image in images], PICTURE) if struct else pa.array(images)
    table = pa.table({"other": pa.array(range(len(images))), "image": column, "label": labels})
    pq.write_table(table, file, row_group_size=group_rows)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of 40, 31 and 20 images in groups of 10, 7 and 20 rows."""
    for number, (count, group_rows) in enumerate([(40, 10), (31, 7), (20, 20)]):
        labels = [f"class {row % 3}" for row in range(count)]
        file = tmp_path / "images" / f"train-{number}.parquet"
        write_images(file, pictures(count, number), labels, group_rows, struct=number != 1)
    return tmp_path / "images"


def opened(path: Path | str, cache: str = "none", **keys: Any) -> SampleSource:
    return open_data("parquet", path=str(path), validation_fraction=0, cache=cache, **keys).train


def stored_bytes(folder: Path, columns: set[str]) -> list[int]:
    """Return the compressed bytes of the columns, group by group."""
    footers = [pq.read_metadata(file) for file in sorted(folder.glob("*.parquet"))]
    groups = [footer.row_group(number) for footer in footers for number in range(footer.num_row_groups)]
    chunks = [[group.column(number) for number in range(group.num_columns)] for group in groups]
    return [sum(one.total_compressed_size for one in group if one.path_in_schema in columns) for group in chunks]


IMAGE_BYTES = {"image.bytes", "image", "label"}


def assert_same_rows(one: SampleSource, other: SampleSource, ids: np.ndarray) -> None:
    ours, theirs = one.take(ids), other.take(ids)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].flags.c_contiguous
        assert np.array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_the_rows_are_those_of_the_cache(folder: Path, tmp_path: Path, cache: str) -> None:
    groups, kept = opened(folder), opened(folder, cache, cache_dir=str(tmp_path / "cache"))
    assert isinstance(groups, ParquetGroups)
    assert groups.schema == kept.schema
    assert groups.fingerprint == kept.fingerprint
    assert np.array_equal(groups.labels, kept.labels)
    assert (groups.row_cost, kept.row_cost) == ("expensive", "cheap")
    assert kept.groups is None
    assert groups.groups.tolist() == [0, 10, 20, 30, 40, 47, 54, 61, 68, 71, 91]
    assert_same_rows(groups, kept, np.random.default_rng(0).integers(0, 91, 300))
    assert_same_rows(groups, kept, np.empty(0, np.int64))
    with pytest.raises(ValueError, match=r"first 91: valid are 0\.\.90"):
        groups.take(np.array([3, 91]))


def test_numbers_are_those_of_the_cache(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {"image": rng.normal(size=50), "label": rng.integers(0, 9, 50), "y": rng.integers(0, 3, 50)}
    pq.write_table(pa.table(columns), tmp_path / "n.parquet", row_group_size=8)
    keys = {"label_column": "y", "cache_dir": str(tmp_path / "cache")}
    groups, kept = (opened(tmp_path / "n.parquet", cache, **keys) for cache in ("none", "disk"))
    assert groups.schema.columns["features"].shape == (2,)
    assert_same_rows(groups, kept, rng.integers(0, 50, 200))


def test_bytes_are_those_of_the_column_chunks_and_nothing_is_read_twice(folder: Path) -> None:
    source, stored = opened(folder), stored_bytes(folder, IMAGE_BYTES)
    assert len(stored) == 10
    assert source.read(np.array([12, 45, 12, 19]))[1] == stored[1] + stored[4]
    assert source.read(np.array([13, 46]))[1] == 0
    assert source.read(np.array([13, 90]))[1] == stored[9]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(np.array([13]))[1] == 0, "copies of a source share a process's buffer: a block is read by a copy"
    everything = np.random.default_rng(0).permutation(91)
    assert source.read(everything)[1] == sum(stored) - stored[1] - stored[4] - stored[9]
    source.prepare()
    assert source.read(everything)[1] == sum(stored), "a run counts from its own beginning"


def test_the_buffer_is_bounded_and_what_it_holds_is_used_first(folder: Path) -> None:
    stored = stored_bytes(folder, IMAGE_BYTES)
    nothing_kept = opened(folder, buffer_bytes=0)
    for _ in range(2):
        assert nothing_kept.read(np.array([0, 1, 2]))[1] == stored[0]
    size = opened(folder)._buffer().group(0)[0].nbytes
    two_kept = opened(folder, buffer_bytes=int(2.5 * size))
    assert two_kept.read(np.array([0, 10, 20]))[1] == sum(stored[:3])
    assert two_kept.read(np.array([0, 10, 20]))[1] == stored[0], "groups 1 and 2 are held, whatever comes first"
    assert two_kept._buffer()._held_bytes <= 2.5 * size


def test_an_epoch_in_windows_reads_each_group_about_once(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "a.parquet", pictures(640), [row % 2 for row in range(640)], 10)
    total = sum(stored_bytes(tmp_path / "a", IMAGE_BYTES))
    window = sum(group.nbytes for group in (opened(tmp_path / "a")._buffer().group(k)[0] for k in range(8)))
    for share in (1.0, 0.5):
        source = opened(tmp_path / "a", buffer_bytes=int(window * 1.3))
        selection = Selection.of_mask(np.random.default_rng(0).random(640) < share)
        shuffled = Plan.of_selection(selection, 12, 0, 0, groups=source.groups, window_rows=80)
        uniform = Plan.of_selection(selection, 12, 0, 0)
        read = [
            sum(source.read(plan.rank_rows(0, 1, step, step + 1)[0])[1] for step in range(plan.num_steps))
            for plan in (shuffled, uniform)
        ]
        assert total * 0.98 <= read[0] <= total * 1.2
        assert read[1] > 2 * total


def test_a_buffer_that_is_too_small_for_a_window_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "a.parquet", pictures(91), [row % 2 for row in range(91)], 10)
    opened(tmp_path)
    assert not caplog.messages
    opened(tmp_path, buffer_bytes=1000)
    assert "9 row groups of up to 0 MB are mixed and do not fit into data.buffer_bytes = 1000" in caplog.text
    enough = int(caplog.text.rpartition("data.buffer_bytes=")[2])
    caplog.clear()
    opened(tmp_path, buffer_bytes=enough)
    assert not caplog.messages


def test_pickles_are_small_and_threads_share(tmp_path: Path) -> None:
    images = pictures(2_000, size=(3, 3))
    write_images(tmp_path / "a.parquet", images, [row % 2 for row in range(2_000)], 5)
    source = opened(tmp_path / "a.parquet", buffer_bytes=2_000)
    assert len(source.groups) == 401
    pickled = pickle.dumps(source)
    assert len(pickled) < 2_000
    again = pickle.loads(pickled)
    assert np.array_equal(again.groups, source.groups)
    assert np.array_equal(again.labels, source.labels)
    ids = [np.random.default_rng(seed).integers(0, 2_000, 64) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for chosen, taken in zip(ids, pool.map(again.take, ids), strict=True):
            expected = [np.asarray(Image.open(io.BytesIO(images[sample]))) for sample in chosen]
            assert np.array_equal(taken["image"][..., 0], np.stack(expected))


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_any_file_system_works(folder: Path, tmp_path: Path, cache: str) -> None:
    memory = fsspec.filesystem("memory")
    for file in folder.glob("*.parquet"):
        memory.pipe(f"/{tmp_path.name}/{file.name}", file.read_bytes())
    local = opened(folder, cache_dir=str(tmp_path / "cache"))
    far = opened(f"memory://{tmp_path.name}", cache, cache_dir=str(tmp_path / "cache"))
    assert far.groups is None or np.array_equal(far.groups, local.groups)
    assert_same_rows(far, local, np.arange(91))
    assert opened(folder.as_uri()).fingerprint == local.fingerprint
    single = opened(f"memory://{tmp_path.name}/train-1.parquet")
    assert_same_rows(single, opened(folder / "train-1.parquet"), np.arange(31))
    with pytest.raises(ValueError, match="neither a Parquet file nor a folder"):
        opened("memory://nowhere")


def test_image_size_brings_images_to_one_size(tmp_path: Path) -> None:
    images = [*pictures(4, size=(8, 12)), *pictures(4, size=(16, 8))]
    file = write_images(tmp_path / "a.parquet", images, [0, 1] * 4, 3)
    cut, kept = (opened(file, cache, image_size=8, cache_dir=str(tmp_path / "c")) for cache in ("none", "disk"))
    assert cut.schema.columns["image"].shape == (8, 8, 1)
    assert_same_rows(cut, kept, np.arange(8))
    assert np.array_equal(
        cut.take(np.array([0]))["image"][0, ..., 0], np.asarray(Image.open(io.BytesIO(images[0])))[:, 2:10]
    )
    with pytest.raises(ValueError, match=r"row 4 is an image of 8×16 pixels .*: set data\.image_size=8"):
        opened(file).take(np.arange(8))
    assert opened(file, image_size=7).fingerprint != cut.fingerprint
    with pytest.raises(ValueError, match=r"data\.image_size is 0: give pixels, at least 1"):
        opened(file, image_size=0)
    pq.write_table(pa.table({"a": [0.5, 1.5], "y": [0, 1]}), tmp_path / "n.parquet")
    with pytest.raises(ValueError, match=r"data\.image_size is set and .* has no image column"):
        opened(tmp_path / "n.parquet", image_size=8)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_bad_rows_are_refused_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: str) -> None:
    images: list[Any] = pictures(20)
    images[3], images[12] = b"no image", None
    labels = [None if row == 7 else row % 4 for row in range(20)]
    file = write_images(tmp_path / "a.parquet", images, labels, 5)
    keys = {"on_error": "skip", "cache_dir": str(tmp_path / "cache")}
    left, kept = opened(file, cache, **keys), opened(file, "disk", **keys)
    assert len(left) == 17
    assert left.fingerprint == kept.fingerprint
    assert_same_rows(left, kept, np.arange(17))
    assert (
        "left out 3 of 20 samples that can't be read, first: a.parquet row 3, a.parquet row 7, a.parquet row 12"
        in caplog.text
    )
    whole = write_images(tmp_path / "b.parquet", images, [0, 1] * 10, 5)
    with pytest.raises(ValueError, match=r"b\.parquet row 12 is not a readable image .*data\.on_error=skip"):
        opened(whole).take(np.array([13, 12]))


def test_a_damaged_row_group_is_named_or_left_out(tmp_path: Path) -> None:
    table = pa.table({"a": np.arange(30.0), "y": np.arange(30) % 2})
    file = tmp_path / "n.parquet"
    pq.write_table(table, file, row_group_size=10, use_dictionary=False)
    start = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    file.write_bytes(bytes(content))
    source = opened(file)
    assert source.take(np.array([29, 0]))["features"].ravel().tolist() == [29, 0]
    with pytest.raises(OSError, match=r"n\.parquet row group 1 can't be read .*: restore it, or leave it out"):
        source.take(np.array([15]))
    rest = opened(file, on_error="skip")
    assert rest.take(np.arange(20))["features"].ravel().tolist() == [*range(10), *range(20, 30)]
    assert rest.groups.tolist() == [0, 10, 20]


def test_auto_does_not_change_the_order_if_the_disk_is_too_small(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folder, "auto", cache_dir=str(tmp_path / "cache")).prepare()
    monkeypatch.setattr(decoded, "_free_bytes", lambda root: 91 * 35)
    assert opened(folder, "auto", cache_dir=str(tmp_path / "cache")).groups is None, "its entry is there"
    with pytest.raises(DataError, match=r"more than half of the free space at .*, or set data\.cache=none"):
        opened(folder, "auto", cache_dir=str(tmp_path / "other"))
    assert isinstance(opened(folder, "none", cache_dir=str(tmp_path / "cache")), ParquetGroups)
    assert opened(folder, "disk", cache_dir=str(tmp_path / "cache")).groups is None
    with pytest.raises(ValueError, match=r"data\.cache = 'nome': did you mean 'none'"):
        opened(folder, "nome")


def test_statistics_read_a_few_groups_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(folder, buffer_bytes=1 << 20)
    values = source.take(np.arange(91))["image"] / 255
    assert input_statistics(source)[0][0] == pytest.approx(values.mean(), rel=1e-9)
    monkeypatch.setattr("rayprune.sources.registry.MAX_GROUPS", 2)
    few = np.concatenate([values[:10], values[47:54]])  # groups 0 and 5 of 10
    assert input_statistics(source)[0][0] == pytest.approx(few.mean(), rel=1e-9)
