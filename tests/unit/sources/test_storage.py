"""Files on all kinds of file systems: a local path, file://, memory:// and an S3 server on this machine."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from rayprune.errors import DataError
from rayprune.sources import open_data
from rayprune.sources.storage import RangeReader, Storage, StoredFile, public
from tests.support.object_store import object_store
from tests.support.sources import encode_image, pixels

FILES = {"a.bin": bytes(range(200)), "b/größe é.bin": b"two words", "b/c/empty.bin": b"", "b.bin": b"x" * 70_000}
SCHEMES = ["path", "file", "memory", "s3"]


@pytest.fixture(scope="module")
def s3_endpoint():
    """Start an S3 server with the bucket `bucket`; return its address."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL")
        yield store.url.removeprefix("http://")


@pytest.fixture
def root(request, tmp_path):
    """Return a function: scheme → the URI of an empty folder, and one that writes a file below it."""

    def make(scheme):
        if scheme in {"path", "file"}:
            return (str(tmp_path) if scheme == "path" else tmp_path.as_uri()), write_local(tmp_path)
        if scheme == "memory":
            folder = f"memory://{tmp_path.name}"
            return folder, lambda name, content: fsspec.filesystem("memory").pipe(f"{folder}/{name}", content)
        endpoint = request.getfixturevalue("s3_endpoint")
        uri = f"s3://bucket/{tmp_path.name}/in?endpoint_override={endpoint}&scheme=http"
        return uri, write_s3(endpoint, f"bucket/{tmp_path.name}/in")

    return make


def write_local(folder: Path):
    def write(name, content):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def write_s3(endpoint, folder):
    filesystem = pafs.S3FileSystem(endpoint_override=endpoint, scheme="http")

    def write(name, content):
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(content)

    return write


def below(uri, name):
    """Return the URI of a file in a folder, before the settings."""
    path, mark, settings = uri.partition("?")
    return f"{path}/{name}{mark}{settings}"


def read_range(storage, name, offset, num_bytes):
    """Return a part of a file, and check the bytes that were counted."""
    pieces, num_read = RangeReader(storage, (name,)).read(np.array([0]), np.array([offset]), np.array([num_bytes]))
    assert num_read == num_bytes
    return pieces[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_files_of_a_folder_are_listed_and_read(root, scheme):
    uri, write = root(scheme)
    for name, content in FILES.items():
        write(name, content)
    storage = pickle.loads(pickle.dumps(Storage(uri)))
    assert (storage.is_folder(), storage.is_file()) == (True, False)
    assert storage.files() == [StoredFile(name, len(content)) for name, content in sorted(FILES.items())]
    for name, content in FILES.items():
        assert storage.read(name) == content
    assert read_range(storage, "a.bin", 17, 5) == bytes(range(17, 22))
    assert storage.is_local == (scheme in {"path", "file"})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_path_may_name_a_single_file(root, scheme):
    uri, write = root(scheme)
    write("b/größe é.bin", FILES["a.bin"])
    storage = Storage(below(uri, "b/größe é.bin"))
    assert (storage.is_folder(), storage.is_file()) == (False, True)
    assert storage.read() == FILES["a.bin"]
    assert read_range(storage, "", 199, 1) == b"\xc7"
    assert storage.file() == StoredFile("", 200)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_path_may_end_with_a_slash(root, scheme):
    uri, write = root(scheme)
    write("a.bin", b"one")
    storage = Storage(below(uri, ""))
    assert [file.name for file in storage.files()] == ["a.bin"]
    assert storage.read("a.bin") == b"one"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_missing_files_and_folders_are_refused(root, scheme):
    uri, write = root(scheme)
    write("a.bin", b"12345")
    storage = Storage(uri)
    with pytest.raises(OSError, match=r"nothing\.bin"):
        storage.read("nothing.bin")
    with pytest.raises(ValueError, match=r"a\.bin is shorter than it was"):
        read_range(storage, "a.bin", 3, 4)
    with pytest.raises(ValueError, match=r"a\.bin (is shorter than it was|can't be read)"):
        read_range(storage, "a.bin", 30, 4)
    gone = Storage(below(uri, "gone"))
    assert (gone.is_folder(), gone.is_file()) == (False, False)
    with pytest.raises(ValueError, match="gone can't be reached") as caught:
        gone.files()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_open_file_serves_many_threads(root, scheme):
    uri, write = root(scheme)
    content = np.random.default_rng(0).bytes(100_000)
    write("a.bin", content)
    file = Storage(uri).open("a.bin")
    starts = np.random.default_rng(1).integers(0, 99_000, 60).tolist()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: file.read_at(1000, start), starts))
    assert parts == [content[start : start + 1000] for start in starts]


def test_the_endpoint_may_come_from_the_environment(root, s3_endpoint, monkeypatch):
    uri, write = root("s3")
    write("a.bin", b"one")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_endpoint}")
    assert Storage(uri.partition("?")[0]).read("a.bin") == b"one"


def test_names_may_contain_blanks_and_percent_signs(tmp_path):
    folder = tmp_path / "a b%20c"
    write_local(folder)("x y%.bin", b"one")
    for path in (str(folder), folder.as_uri()):
        assert [file.name for file in Storage(path).files()] == ["x y%.bin"]
        assert Storage(path).read("x y%.bin") == b"one"


def test_home_and_relative_paths_are_expanded(tmp_path, monkeypatch):
    write_local(tmp_path / "home")("a.bin", b"one")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert Storage("~").read("a.bin") == Storage("home").read("a.bin") == b"one"
    assert Storage("home").path == str(tmp_path / "home")


@pytest.mark.parametrize("uri", ["nosuch://host/path", "s3://no-such-bucket-here/a?scheme=http"])
def test_unreachable_file_systems_are_refused(uri, s3_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{s3_endpoint}")
    with pytest.raises(ValueError, match=r"can't be reached .*: correct the address, or the file system's") as caught:
        Storage(uri).files()
    assert "\n" not in str(caught.value)


def test_public_paths_hold_no_secret():
    uri = "s3://key:secret%2Fpart@bucket/folder?region=eu"
    assert "secret" not in public(uri)
    assert public("s3://key:secret@bucket/a@b?x=1") == "s3://bucket/a@b"
    assert public("/local/a?b@c") == "/local/a?b@c"


def tar_of(images):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for row, image in enumerate(images):
            for name, content in ((f"{row:03}.png", image), (f"{row:03}.cls", b"%d" % (row % 3))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_are_read_by_ranges(root, scheme, tmp_path):
    uri, write = root(scheme)
    images = pixels(12, (100, 90))
    encoded = [encode_image(image) for image in images]
    write("train-0.tar", tar_of(encoded[:6]))
    write("train-1.tar", tar_of(encoded[6:9]))
    write("val-0.tar", tar_of(encoded[9:]))
    keys = {"path": uri, "cache_dir": str(tmp_path / "cache")}
    splits = open_data("webdataset", cache="none", **keys)
    assert (len(splits.train), len(splits.validation)) == (9, 3)
    source = pickle.loads(pickle.dumps(splits.train))
    columns, num_bytes = source.read(np.array([8, 1, 4]))
    np.testing.assert_array_equal(columns["image"], images[[8, 1, 4]])
    assert columns["label"].tolist() == [2, 1, 1]
    assert num_bytes == len(encoded[8]) + len(encoded[1]) + len(encoded[4])
    decoded = open_data("webdataset", cache="disk", **keys).train
    assert decoded.fingerprint == source.fingerprint
    np.testing.assert_array_equal(decoded.take(np.arange(9))["image"], images[:9])
    single = open_data("webdataset", **{**keys, "path": below(uri, "train-1.tar")}, validation_fraction=0).train
    np.testing.assert_array_equal(single.take(np.arange(3))["image"], images[6:9])


def write_damaged_tree(root):
    files = fsspec.filesystem("memory")
    for part in ("train", "val"):
        for file, content in (("a/0.png", b"no image"), ("b/1.png", b""), ("part.parquet", b"PAR1")):
            files.pipe_file(f"{root}/{part}/{file}", content)


@pytest.mark.parametrize("source", ["image_folder", "parquet", "imagenet", "webdataset"])
@pytest.mark.parametrize(
    "place", ["none", "tree", "tree/train", "tree/train/a", "tree/val/b", "tree/train/part.parquet"]
)
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_no_message_shows_a_secret(tmp_path, caplog, source, place, on_error):
    write_damaged_tree("/key:SECRET@bucket/tree")
    path = f"memory://key:SECRET@bucket/{place}"
    with caplog.at_level(logging.DEBUG, "rayprune"), pytest.raises(ValueError) as caught:  # noqa: PT011
        open_data(source, path=path, on_error=on_error, cache="none", cache_dir=str(tmp_path)).train.take(np.arange(1))
    assert "SECRET" not in str(caught.value) + caplog.text


def test_links_are_followed_but_never_into_a_loop(tmp_path, caplog):
    for number in range(24):
        folder = tmp_path / "data" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "24.jpg").write_bytes(b"xy")
    data = tmp_path / "data"
    (data / "class0" / "up").symlink_to(data)
    (data / "class1" / "here").symlink_to(".")
    (data / "class1" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    (data / "class1" / "25.jpg").symlink_to(tmp_path / "elsewhere" / "24.jpg")
    (data / "class1" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        files = {file.name: file.num_bytes for file in Storage(str(data)).files()}
    assert len(files) == 24 + 3
    assert files["class1/more/24.jpg"] == files["class1/25.jpg"] == 2
    assert files["class1/broken.jpg"] == 0
    assert f"left out 3 links in {data} to a folder above them, first class0/up" in caplog.text


READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from rayprune.sources import open_data
source, path = sys.argv[1:]
keys = {"buffer_bytes": 0} if source == "parquet" else {}
data = open_data(source, path=path, cache="none", validation_fraction=0, **keys).train
rows = data.take(np.random.default_rng(0).permutation(len(data)))
held = []
try:
    while True:
        held.append(open(path + "/../used"))
except OSError:
    pass
try:
    for ids in np.array_split(np.arange(len(data)), 20):
        data.take(ids)
except (ValueError, OSError) as error:
    print(len(rows["label"]), error)
"""


@pytest.mark.parametrize("source", ["image_folder", "webdataset", "parquet"])
def test_many_files_need_few_handles_and_too_few_are_one_line(tmp_path, source):
    images, data = [encode_image(image) for image in pixels(100, (6, 4), 3, 0)], tmp_path / "data"
    (tmp_path / "used").write_text("")
    for number, image in enumerate(images):
        folder = data / str(number % 2) if source == "image_folder" else data
        folder.mkdir(parents=True, exist_ok=True)
        if source == "image_folder":
            (folder / f"{number}.png").write_bytes(image)
        elif source == "webdataset":
            (folder / f"{number:03}.tar").write_bytes(tar_of([image]))
        else:
            pq.write_table(pa.table({"image": [image], "label": [number % 2]}), folder / f"{number:03}.parquet")
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, source, str(data)],
        capture_output=True,
        text=True,
        env={**os.environ, "RAYPRUNE_CACHE": str(tmp_path / "cache")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert re.fullmatch(
        r"100 [^\n]* (can't be read|is not a readable image) [^\n]*: raise the limit on open files .*\n", done.stdout
    )


def test_a_range_beyond_the_file_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    reader = RangeReader(Storage(str(tmp_path)), ("a",))
    with pytest.raises(DataError, match="a is shorter than it was when it was opened: restore it"):
        reader.read(np.array([0]), np.array([0]), np.array([10**15]))
