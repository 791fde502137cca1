"""Rows decoded once: modes, room on the disk, several processes, half-written entries, changed data."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayprune.sources import open_data
from rayprune.sources.cache import decoded, is_complete
from rayprune.sources.images import folder as image_folder
from tests.support.sources import all_rows

Usage = namedtuple("Usage", "total used free")
ROW_BYTES = 5 * 6 * 3 + 8


@pytest.fixture
def opened(tmp_path):
    """Open the images below the test's own folder in a mode, without holdout."""

    def call(mode, **keys):
        defaults = {"path": str(tmp_path / "data"), "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0}
        return open_data("image_folder", cache=mode, **defaults | keys).train

    return call


@pytest.fixture
def data(tmp_path):
    """Write forty images in two classes."""
    for number in range(40):
        write(tmp_path / "data" / "ab"[number % 2] / f"{number:02}.bmp", number)
    return tmp_path / "data"


def write(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)).save(file)


def entries(tmp_path):
    return sorted(entry.name for entry in (tmp_path / "cache").glob("*"))


def assert_same(first, second):
    for name, column in all_rows(first).items():
        other = all_rows(second)[name]
        assert (column.dtype, column.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(column, other)


def record_decodings(monkeypatch):
    """Return a list that gets the file name of every image that is decoded from now on."""
    decode_rows, files = image_folder.decode_rows, []

    def record(encoded, images, name, rows):
        files.extend(Path(name(position)).name for position in range(len(encoded)))
        return decode_rows(encoded, images, name, rows)

    monkeypatch.setattr(image_folder, "decode_rows", record)
    return files


def test_modes_agree_bit_for_bit(tmp_path, data, opened, monkeypatch):
    none = opened("none")
    for mode in ("disk", "memory", "auto"):
        source = opened(mode)
        assert_same(source, none)
        assert source.fingerprint == none.fingerprint
        assert source.schema == none.schema
        np.testing.assert_array_equal(source.labels, none.labels)
        assert (source.row_cost, none.row_cost) == ("cheap", "expensive")
        ids = np.array([39, 0, 39])
        num_bytes = source.read(ids)[1]
        assert num_bytes == len(ids) * ROW_BYTES
        with monkeypatch.context() as patch:
            files = record_decodings(patch)
            source.take(ids)
        assert files == []
        assert_same(pickle.loads(pickle.dumps(source)), none)
    assert entries(tmp_path) == [f"decoded-{none.fingerprint}"]


def test_neither_none_nor_memory_writes(tmp_path, data, opened):
    for mode in ("none", "memory"):
        assert_same(opened(mode), opened(mode))
    assert not (tmp_path / "cache").exists()


def test_rows_are_decoded_once_for_all_parts(data, opened, monkeypatch):
    files = record_decodings(monkeypatch)
    splits = open_data(
        "image_folder", path=str(data), cache="disk", cache_dir=str(data.parent / "cache"), validation_fraction=0.25
    )
    splits.train.prepare()
    splits.validation.prepare()
    assert sorted(files) == sorted(file.name for file in data.rglob("*.bmp"))
    opened("disk").take(np.arange(40))
    assert len(files) == 40


def test_cheap_rows_are_kept_as_they_are():
    digits = open_data("digits").train
    assert decoded(digits, "auto") is digits
    assert digits.schema.row_bytes == 72


def test_auto_decodes_at_every_visit_if_the_disk_is_too_small(tmp_path, data, opened, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 40 * ROW_BYTES - 1))
    with caplog.at_level(logging.WARNING):
        assert opened("auto").row_cost == "expensive"
    assert "they are decoded at every visit; set data.cache=disk, or data.cache_dir to a larger disk" in caplog.text
    with pytest.raises(ValueError, match=r"GB free and 0\.00 GB are needed: .*data\.cache_dir"):
        opened("disk").prepare()
    assert entries(tmp_path) == []


def test_an_existing_entry_needs_no_room(tmp_path, data, opened, monkeypatch):
    opened("disk").prepare()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 0))
    source = opened("auto")
    assert source.row_cost == "cheap"
    assert len(all_rows(source)["image"]) == 40


def checksum(folder):
    source = open_data(
        "image_folder", path=str(folder / "data"), cache="disk", cache_dir=str(folder / "cache"), validation_fraction=0
    ).train
    return os.getpid(), int(all_rows(source)["image"].sum())


def test_two_processes_may_build_at_once(tmp_path, data, opened):
    expected = int(all_rows(opened("none"))["image"].sum())
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(checksum, tmp_path) for _ in range(2)]
        assert [task.result()[1] for task in tasks] == [expected] * 2
    assert entries(tmp_path) == [f"decoded-{opened('none').fingerprint}"]


@pytest.mark.parametrize("damage", ["short", "no manifest", "column missing"])
def test_half_written_entries_are_built_again(tmp_path, data, opened, damage):
    none = opened("none")
    opened("disk").prepare()
    entry = tmp_path / "cache" / f"decoded-{none.fingerprint}"
    assert is_complete(entry)
    match damage:
        case "short":
            file = entry / "image.npy"
            file.write_bytes(file.read_bytes()[:-1000])
        case "no manifest":
            (entry / "manifest.json").unlink()
        case "column missing":
            (entry / "label.npy").unlink()
    assert not is_complete(entry)
    assert_same(opened("disk"), none)
    assert is_complete(entry)


def test_changed_data_get_a_new_entry(tmp_path, data, opened):
    opened("disk").prepare()
    changed = Path(data / "a" / "00.bmp")
    write(changed, 1000)
    assert_same(opened("disk"), opened("none"))
    assert len(entries(tmp_path)) == 2
    opened("disk", image_size=4).prepare()
    opened("disk", num_channels=1).prepare()
    assert len(entries(tmp_path)) == 4


def test_a_damaged_image_leaves_no_entry(tmp_path, data, opened):
    (data / "b" / "05.bmp").write_bytes((data / "b" / "05.bmp").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b/05\.bmp is not a readable image"):
        opened("disk").prepare()
    assert entries(tmp_path) == []


def test_an_unknown_mode_is_refused(data, opened):
    with pytest.raises(ValueError, match=r"data\.cache = 'disc': did you mean 'disk'"):
        opened("disc")
