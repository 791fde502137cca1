"""Paths of run folders on a local disk, in memory and on an S3 server that fails."""

from __future__ import annotations

import _thread
import hashlib
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch

from rayprune.engine.monitoring import kept_handlers
from rayprune.errors import ConfigError
from rayprune.paths import ObjectPath, as_path, copy_tree, on_filesystem, remove_tree, replace_file, replace_folder
from tests.support.command_line import environment
from tests.support.object_store import BUCKET, ObjectStore, object_store


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture(params=["local", "memory", "s3", "with folders"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return an empty folder."""
    if request.param == "local":
        return tmp_path
    if request.param == "with folders":
        return on_filesystem("runs", pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    if request.param == "s3":
        request.getfixturevalue("store")
        return as_path(f"{BUCKET}/{tmp_path.name}")
    return as_path(f"memory://{tmp_path.name}/runs")


def names(folder: Path, pattern: str = "*") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))


def test_uris_are_object_paths_and_others_local_ones() -> None:
    path = as_path("s3://bucket/runs/") / "a.b"
    assert (str(path), path.name, path.suffix, str(path.parent)) == (
        "s3://bucket/runs/a.b",
        "a.b",
        ".b",
        "s3://bucket/runs",
    )
    assert (path.resolve(), path.absolute(), path.expanduser()) == (path, path, path)
    assert pickle.loads(pickle.dumps(path)) == path
    assert as_path(path) is path
    assert as_path("file:///mnt/runs") == Path("/mnt/runs")
    assert as_path("~/runs") == Path.home() / "runs"
    assert as_path("runs") == Path("runs")


@pytest.mark.parametrize(
    "uri", ["s3://key:hush@bucket/a", "s3://bucket/a?token=hush", "s3://bucket?region=x", "abfs://user:hush@a/b"]
)
def test_credentials_in_a_uri_are_refused_and_not_shown(uri: str) -> None:
    with pytest.raises(ConfigError, match="by the environment") as caught:
        as_path(uri)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("abfs://container@account.dfs.core.windows.net/runs/a", "container/runs/a"),
        ("abfs://account.blob.core.windows.net/container/runs", "container/runs"),
        ("gs://bucket/runs", "bucket/runs"),
    ],
)
def test_other_stores_have_their_own_paths(uri: str, key: str) -> None:
    assert as_path(uri).key == key  # type: ignore[attr-defined]


def test_a_uri_with_one_slash_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"s3:/bucket/a is neither .*: write it as s3://bucket/a"):
        as_path("s3:/bucket/a")


def test_a_file_system_that_is_unknown_or_can_only_be_read_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"nosuch://bucket can't be reached \(Protocol not known: nosuch\): correct it"
    ):
        as_path("nosuch://bucket/a").exists()
    with pytest.raises(OSError, match="this file system can only be read"):
        as_path("http://127.0.0.1:1/a").write_text("")


@pytest.mark.parametrize("uri", ["s3://", "gs:///"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        as_path(uri)


def test_a_library_that_wants_a_local_file_does_not_write_one() -> None:
    with pytest.raises(TypeError, match=r"s3://bucket/a\.npy is on an object store"):
        np.save(as_path("s3://bucket/a.npy"), np.zeros(1))


def test_files_are_written_read_and_deleted(root: Path) -> None:
    file = root / "text.txt"
    assert not file.exists()
    file.write_text("größe\n", encoding="utf-8")
    with file.open("a", encoding="utf-8") as stream:
        stream.write("two\n")
    assert file.read_text(encoding="utf-8") == "größe\ntwo\n"
    assert (file.is_file(), file.is_dir(), root.is_dir(), file.exists()) == (True, False, True, True)
    assert file.stat().st_size == len("größe\ntwo\n".encode())
    assert file.stat().st_mtime_ns > 10**18 or str(file).startswith("memory:")  # which keeps no times
    file.unlink()
    assert not file.exists()
    file.unlink(missing_ok=True)
    for read in (file.unlink, file.stat, file.read_bytes):
        with pytest.raises(FileNotFoundError):
            read()


def test_files_are_listed(root: Path) -> None:
    for name in ("a/x.json", "a/y.txt", "b/x.json", "c.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    assert names(root) == ["a", "b", "c.json"]
    assert names(root, "*.json") == ["c.json"]
    assert names(root, "*/x.json") == ["a/x.json", "b/x.json"]
    assert names(root, "a/*") == ["a/x.json", "a/y.txt"]
    assert names(root / "none") == []
    assert sorted(path.name for path in (root / "a").iterdir()) == ["x.json", "y.txt"]


def test_states_of_numpy_and_torch_are_kept(root: Path) -> None:
    root.mkdir(exist_ok=True)
    arrays = {"a": np.arange(100_000), "b": np.ones(3, dtype=bool)}
    with (root / "a.npz").open("wb") as stream:
        np.savez(stream, **arrays)
    with (root / "a.npz").open("rb") as stream, np.load(stream) as stored:
        assert all(np.array_equal(stored[name], array) for name, array in arrays.items())
    with (root / "m.pt").open("wb") as stream:
        torch.save({"w": torch.ones(2, 3)}, stream)
    with (root / "m.pt").open("rb") as stream:
        assert torch.equal(torch.load(stream, weights_only=True)["w"], torch.ones(2, 3))
    with (root / "a.npz").open("rb") as stream:
        assert hashlib.file_digest(stream, "sha256").digest() == hashlib.sha256((root / "a.npz").read_bytes()).digest()


def write_half(file: Path) -> None:
    with replace_file(file) as temporary:
        temporary.write_text("half")
        raise KeyError


def test_a_replaced_file_is_whole_or_untouched(root: Path) -> None:
    root.mkdir(exist_ok=True)
    file = root / "a.txt"
    with replace_file(file) as temporary:
        temporary.write_text("größe", encoding="utf-8")
    with pytest.raises(KeyError):
        write_half(file)
    assert file.read_bytes() == "größe".encode()
    assert list(root.iterdir()) == [file]


@pytest.mark.parametrize("root", ["memory", "s3"], indirect=True)
def test_ctrl_c_does_not_cut_an_upload(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfileobj

    def interrupted(*arguments: Any) -> None:
        _thread.interrupt_main()
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    (root / "a").write_text("old")
    with kept_handlers(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train's handler outlives the run of another test
        with pytest.raises(KeyboardInterrupt), replace_file(root / "a") as partial:
            partial.write_text("new" * 1000)
    assert (root / "a").read_text() == "new" * 1000


def test_a_file_is_not_replaced_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_half(tmp_path / "gone" / "a.txt")
    assert not list(tmp_path.iterdir())


def test_a_replaced_folder_has_nothing_of_the_old_one(root: Path) -> None:
    for content in ("old", "new"):
        with replace_folder(root / "g", last="index") as partial:
            (partial / "index").write_text(content)
            (partial / content).write_text("")
    assert names(root / "g") == ["index", "new"]
    with pytest.raises(KeyError), replace_folder(root / "g"):
        raise KeyError
    assert (names(root), names(root / "g")) == (["g"], ["index", "new"])


def test_folders_are_copied_between_any_two_places_and_deleted(root: Path, tmp_path: Path) -> None:
    origin = tmp_path.with_name(f"{tmp_path.name}-origin")
    origin.mkdir()
    (origin / "deep").mkdir()
    (origin / "deep" / "a").write_text("1")
    (origin / "manifest").write_text("2")
    copy_tree(origin, root / "one", last="manifest")
    (root / "one" / "old").write_text("")
    copy_tree(root / "one", root / "two")
    copy_tree(origin, root / "one")
    assert (names(root / "one"), names(root / "two")) == (["deep", "manifest"], ["deep", "manifest", "old"])
    assert (root / "two" / "deep" / "a").read_text() == "1"
    remove_tree(root / "two")
    remove_tree(root / "two")
    assert names(root) == ["one"]


def test_a_file_system_that_a_program_has_made_travels_with_its_paths(store: ObjectStore, tmp_path: Path) -> None:
    made = pafs.SubTreeFileSystem("bucket", as_path(BUCKET).filesystem)  # type: ignore[attr-defined]
    path = on_filesystem("below/runs", made) / "a.txt"
    path.write_text("here")
    assert (as_path(BUCKET) / "below" / "runs" / "a.txt").read_text() == "here"
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).read_text())"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, input=pickle.dumps(path), capture_output=True, env=environment())
    assert other.stdout == b"here\n", other.stderr
    assert on_filesystem(str(tmp_path), pafs.LocalFileSystem()) == tmp_path
    assert on_filesystem(f"{BUCKET}/a", None) == as_path(f"{BUCKET}/a")


def test_requests_that_fail_are_tried_again(store: ObjectStore) -> None:
    file = as_path(BUCKET) / "failing" / "a.txt"
    with store.failing(share=0.4) as faults:
        for number in range(10):
            file.write_text(str(number))
            assert (file.read_text(), file.exists(), names(file.parent)) == (str(number), True, ["a.txt"])
    assert faults.num_failed > 10
    assert isinstance(file, ObjectPath)
    assert file.key == "bucket/failing/a.txt"
