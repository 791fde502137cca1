"""Cache entries: built once, atomically, and again when damaged."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from rayprune.sources.cache import cache_root, cached_arrays, new_array

SHAPE = (1000, 16)
KEY = f"decoded-{'0c' * 16}"


def build(folder, pause_s=0.0):
    values = new_array(folder, "values", "int32", SHAPE)
    values[:500] = 1
    time.sleep(pause_s)
    values[500:] = 2
    values.flush()


def refuse(folder):
    raise AssertionError("built again")


def total(root, pause_s=0.0):
    return int(cached_arrays("test-1", root, partial(build, pause_s=pause_s), 64_000)["values"].sum())


def test_an_entry_is_built_once(tmp_path):
    first = cached_arrays("test-1", tmp_path, build, 64_000)["values"]
    again = cached_arrays("test-1", tmp_path, refuse, 64_000)["values"]
    np.testing.assert_array_equal(first, again)
    assert not again.flags.writeable
    assert [entry.name for entry in tmp_path.iterdir()] == ["test-1"]


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "short file", "missing file", "other version"])
def test_damaged_entries_are_rebuilt(tmp_path, damage):
    assert total(tmp_path) == 24_000
    manifest, values = tmp_path / "test-1" / "manifest.json", tmp_path / "test-1" / "values.npy"
    match damage:
        case "no manifest":
            manifest.unlink()
        case "broken manifest":
            manifest.write_text(manifest.read_text()[:20])
        case "short file":
            values.write_bytes(values.read_bytes()[:1000])
        case "missing file":
            values.unlink()
        case "other version":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 0}))
    assert total(tmp_path) == 24_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["test-1"]


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError):
        cached_arrays("test-1", tmp_path, refuse, 1)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_build_at_once(tmp_path):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(total, tmp_path, 1.0) for _ in range(2)]
        assert [task.result() for task in tasks] == [24_000, 24_000]
    assert [entry.name for entry in tmp_path.iterdir()] == ["test-1"]


def test_many_threads_may_replace_a_damaged_entry_at_once(tmp_path):
    (tmp_path / "test-1").mkdir()
    (tmp_path / "test-1" / "values.npy").write_bytes(b"half")
    with ThreadPoolExecutor(4) as pool:
        totals = list(pool.map(lambda _: total(tmp_path, 0.2), range(4)))
    assert totals == [24_000] * 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["test-1"]


def test_too_little_space_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match=r"GB free and 1000000\.00 GB are needed: .*data\.cache_dir"):
        cached_arrays("test-1", tmp_path, refuse, 10**15)


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"can't be written .*RAYPRUNE_CACHE"):
        cached_arrays("test-1", tmp_path / "file" / "cache", build, 1)


def test_folders_of_killed_processes_are_removed(tmp_path):
    other = f".webdataset-index-{'0a' * 16}-x_1y2z3w"
    fresh = f".webdataset-index-{'0b' * 16}-x_1y2z3w"
    ages = {fresh: 60, other: 2 * 86400, ".my-own": 2 * 86400}
    for name, age_s in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "values.npy").write_bytes(b"half")
        for path in (tmp_path / name / "values.npy", tmp_path / name):
            os.utime(path, (time.time() - age_s,) * 2)
    total(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".my-own", fresh, "test-1"]


def build_and_wait(root, started):
    def build_half(folder):
        new_array(folder, "values", "int32", SHAPE)
        started.set()
        time.sleep(60)

    cached_arrays(KEY, root, build_half, 64_000)


def test_the_folder_of_a_killed_builder_goes_at_the_next_start_and_that_of_a_running_one_stays(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    builder = context.Process(target=build_and_wait, args=(tmp_path, started))
    builder.start()
    assert started.wait(20)
    (left,) = tmp_path.iterdir()
    total(tmp_path)
    assert left.exists()
    builder.kill()
    builder.join()
    assert left.exists()
    cached_arrays("test-2", tmp_path, build, 64_000)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["test-1", "test-2"]


def test_the_cache_folder_comes_from_the_argument_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYPRUNE_CACHE", str(tmp_path / "env"))
    assert cache_root(None) == tmp_path / "env"
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("RAYPRUNE_CACHE")
    assert cache_root(None).parts[-2:] == (".cache", "rayprune")
