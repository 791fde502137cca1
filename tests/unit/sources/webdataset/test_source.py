"""Tar shards as WebDataset writes them, read by id, whole and damaged."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
import time

import numpy as np
import psutil
import pytest

from rayprune.sources import open_data
from rayprune.sources.webdataset import index as webdataset_index
from rayprune.sources.webdataset import source as webdataset_rows
from tests.support.sources import all_rows, encode_image, pixels


@pytest.fixture
def opened(tmp_path):
    """Open a path without validation part, decoding at every visit, with a cache of the test's own."""

    def call(path, **keys):
        fixed = {"path": str(path), "cache_dir": str(tmp_path / "cache"), "cache": "none", "validation_fraction": 0}
        return open_data("webdataset", **fixed | keys)

    return call


def tar_of(members, tar_format=tarfile.PAX_FORMAT):
    """Return a tar's bytes: (name, content) in order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def samples_of(images, labels, start=0, prefix=""):
    return [
        member
        for row, (image, label) in enumerate(zip(images, labels, strict=True), start)
        for member in ((f"{prefix}{row:05}.png", encode_image(image)), (f"{prefix}{row:05}.cls", str(label).encode()))
    ]


def write(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members, **options))
    return path


def write_set(folder, count=30, shards=3):
    """Write `count` images of 3 classes over training shards, in no order, and return the pixels."""
    images, part = pixels(count), count // shards
    for shard in reversed(range(shards)):
        rows = range(shard * part, shard * part + part)
        write(folder / f"train-{shard:04}.tar", samples_of(images[rows], [row % 3 for row in rows], rows.start))
    return images


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path, opened, cache):
    images = write_set(tmp_path / "set")
    train = opened(tmp_path / "set", cache=cache).train
    assert (len(train), train.schema.num_classes, train.groups) == (30, 3, None)
    np.testing.assert_array_equal(all_rows(train)["image"], images)
    ids = np.array([29, 0, 29, 12])
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again.take(ids)["image"], images[ids])
    np.testing.assert_array_equal(again.take(ids)["label"], ids % 3)
    assert again.labels.tolist() == [row % 3 for row in range(30)]
    assert again.take(ids[:0])["image"].shape == (0, 5, 6, 3)
    assert len(pickle.dumps(train)) < 3000
    with pytest.raises(ValueError, match="first 30"):
        again.take(np.array([30]))


def test_only_the_requested_images_are_read(tmp_path, opened):
    big = [encode_image(image) for image in pixels(8, size=(100, 90))]
    write(
        tmp_path / "a.tar",
        [pair for row, image in enumerate(big) for pair in ((f"{row}.png", image), (f"{row}.cls", b"0"))],
    )
    source = opened(tmp_path / "a.tar").train
    assert source.read(np.array([5]))[1] == len(big[5])
    assert source.read(np.array([5, 1]))[1] == len(big[5]) + len(big[1])
    assert source.read(np.array([1, 1]))[1] == len(big[1])
    # A header, a label and padding are between neighbors: one range of the file.
    between = source.read(np.array([2, 3]))[1] - len(big[2]) - len(big[3])
    assert 3 * 512 <= between <= 5 * 512


def test_the_second_open_reads_no_shard(tmp_path, opened, monkeypatch):
    write_set(tmp_path / "set")
    first = opened(tmp_path / "set").train

    def refuse(*arguments):
        raise AssertionError("a shard was walked again")

    monkeypatch.setattr(webdataset_index, "_walk", refuse)
    again = opened(tmp_path / "set").train
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.labels, first.labels)


def test_the_fingerprint_follows_the_content(tmp_path, opened):
    images = write_set(tmp_path / "set")
    fingerprint = opened(tmp_path / "set").train.fingerprint
    everything = samples_of(images, [row % 3 for row in range(30)], prefix="other/")
    assert opened(write(tmp_path / "whole.tar", everything)).train.fingerprint == fingerprint
    assert opened(write(tmp_path / "swapped.tar", everything[2:] + everything[:2])).train.fingerprint != fingerprint
    everything[1] = (everything[1][0], b"2")
    assert opened(write(tmp_path / "label.tar", everything)).train.fingerprint != fingerprint
    assert opened(tmp_path / "set", image_size=4).train.fingerprint != fingerprint


def test_a_rewritten_shard_is_indexed_again(tmp_path, opened):
    path = write(tmp_path / "a.tar", samples_of(pixels(2), [0, 1]))
    assert opened(path).train.labels.tolist() == [0, 1]
    write(path, samples_of(pixels(2), [1, 0]))
    assert opened(path).train.labels.tolist() == [1, 0]


def test_shards_are_split_into_training_and_validation(tmp_path, opened):
    images = pixels(6)
    for row, name in enumerate(["train/0", "train/1", "val/0", "extra-0"]):
        write(tmp_path / "set" / f"{name}.tar", samples_of(images[row : row + 1], [int(row in {1, 2})]))
    splits = opened(tmp_path / "set")
    assert (len(splits.train), len(splits.validation)) == (2, 1)
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], images[2:3])
    splits = opened(tmp_path / "set", train_shards="val/*", validation_shards="extra-?")
    assert (splits.train.labels.tolist(), splits.validation.labels.tolist()) == ([1], [0])
    assert opened(tmp_path / "set", validation_shards="").validation is None
    with pytest.raises(ValueError, match=r"data\.validation_shards 'exam\*' matches no shard left for validation"):
        opened(tmp_path / "set", validation_shards="exam*")
    write_set(tmp_path / "one")
    assert len(opened(tmp_path / "one", validation_fraction=0.2).validation) == 6


def test_labels_come_from_the_chosen_member(tmp_path, opened):
    image = encode_image(pixels(1)[0])
    records = [{"label": 1, "breed": "größe"}, {"label": 0, "breed": "owl"}, {"label": 1, "breed": "owl"}]
    members = []
    for row, record in enumerate(records):
        members += [(f"{row}.jpg", image), (f"{row}.json", json.dumps(record).encode()), (f"{row}.txt", b" owl\n")]
    path = write(tmp_path / "a.tar", members)
    assert opened(path).train.labels.tolist() == [1, 0, 1]
    named = opened(path, label_key="json:breed").train
    assert (named.schema.class_names, named.labels.tolist()) == (("größe", "owl"), [0, 1, 1])
    assert opened(path, label_key="txt").train.schema.class_names == ("owl",)
    with pytest.raises(ValueError, match=r"a\.tar sample '0' has no label \(jpg, json, txt\)"):
        opened(path, label_key="json:kind")


def test_a_label_file_goes_before_json(tmp_path, opened):
    members = [("0.json", b'{"label": 7}'), ("0.png", encode_image(pixels(1)[0])), ("0.cls", b"1")]
    assert opened(write(tmp_path / "a.tar", members)).train.labels.tolist() == [1]
    members[0] = ("0.json", b"no json")
    assert opened(write(tmp_path / "b.tar", members)).train.labels.tolist() == [1]


def test_validation_labels_are_those_of_training(tmp_path, opened):
    write(tmp_path / "set" / "train.tar", samples_of(pixels(2), ["cat", "owl"]))
    write(tmp_path / "set" / "test.tar", samples_of(pixels(1), ["owl"]))
    assert opened(tmp_path / "set").validation.labels.tolist() == [1]
    write(tmp_path / "set" / "test.tar", samples_of(pixels(1), ["cow"]))
    with pytest.raises(ValueError, match=r"test\.tar sample '00000' has label 'cow', which no training sample has"):
        opened(tmp_path / "set")


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_member_names_may_be_unicode_long_or_dotted(tmp_path, opened, tar_format):
    image, long = pixels(4), "tief/" * 30 + "x" * 120
    names = ["größe/日本", long, "v1.2/a", "./b"]
    members = [("__meta__/set.json", b"{}"), ("README", b"no suffix")]
    for row, name in enumerate(names):
        members += [
            (f"{name}.PNG", encode_image(image[row])),
            (f"{name}.seg.png", b"mask"),
            (f"{name}.cls", b"%d" % row),
        ]
    train = opened(write(tmp_path / "mit leer é.tar", members, tar_format=tar_format)).train
    np.testing.assert_array_equal(all_rows(train)["image"], image)
    assert train.labels.tolist() == [0, 1, 2, 3]


def test_images_have_one_size_and_mode(tmp_path, opened):
    images = [encode_image(pixels(1, (9, 4))[0]), encode_image(pixels(1)[0], mode="L")]
    path = write(
        tmp_path / "a.tar",
        [(f"{row}.{kind}", content) for row in (0, 1) for kind, content in (("png", images[row]), ("cls", b"0"))],
    )
    with pytest.raises(ValueError, match=r"a\.tar sample '1' is an image of 6×5 pixels and the first one has 9×4: set"):
        opened(path).train.take(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"a\.tar sample '1' is an image of 6×5 pixels"):
        opened(path, on_error="skip")
    assert all_rows(opened(path, image_size=4).train)["image"].shape == (2, 4, 4, 3)
    assert all_rows(opened(path, image_size=4, num_channels=1).train)["image"].shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match=r"data\.num_channels = 2: must be 1, 3 or null"):
        opened(path, num_channels=2)
    assert len(opened(path, image_key="PNG", image_size=4).train) == 2
    with pytest.raises(ValueError, match=r"sample '0' has no image \(its members: png, cls\)"):
        opened(path, image_key="webp")


FAULTS = {
    "has no label": [("3.png", encode_image(pixels(1)[0]))],
    "has an empty label": [("3.png", encode_image(pixels(1)[0])), ("3.cls", b" ")],
    "has no image": [("3.cls", b"1")],
    "has an image of 0 bytes": [("3.png", b""), ("3.cls", b"1")],
    "is not a readable image": [("3.png", encode_image(pixels(1)[0])[:70]), ("3.cls", b"1")],
    r"has two members \.png": [("3.png", encode_image(pixels(1)[0])), ("3.png", b"x"), ("3.cls", b"1")],
    r"has an unsuitable label in \.json": [("3.png", encode_image(pixels(1)[0])), ("3.json", b'{"label": 1.5}')],
    r"has an unsuitable label in \.json \(Exp": [("3.png", encode_image(pixels(1)[0])), ("3.json", b"{")],
    r"has an unsuitable label in \.cls \(3000": [("3.png", encode_image(pixels(1)[0])), ("3.cls", b"x" * 3000)],
    r"has an unsuitable label in \.cls": [("3.png", encode_image(pixels(1)[0])), ("3.cls", b"\xff\xfe")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sample_is_named_or_left_out(tmp_path, opened, fault, caplog):
    path = write(
        tmp_path / "a.tar", [*samples_of(pixels(3), [0, 1, 0]), *FAULTS[fault], *samples_of(pixels(1), [1], 4)]
    )
    with pytest.raises(ValueError, match=rf"a\.tar sample '3' {fault}") as caught:
        all_rows(opened(path).train)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        train = opened(path, on_error="skip").train
    assert train.labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_array_equal(all_rows(train)["image"], pixels(3)[[0, 1, 2, 0]])
    assert "left out 1 " in caplog.text
    assert pickle.loads(pickle.dumps(train)).labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("left", [700, 512 * 7 + 100, 512 * 9])
def test_a_truncated_shard_is_refused_or_left_out(tmp_path, opened, left):
    path = write(tmp_path / "set" / "a.tar", samples_of(pixels(6, (20, 20)), range(6)))
    write(tmp_path / "set" / "b.tar", samples_of(pixels(2, (20, 20)), [0, 1]))
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"a\.tar .*(cut off|no label).*data\.on_error=skip") as caught:
        opened(tmp_path / "set")
    assert "\n" not in str(caught.value)
    train = opened(tmp_path / "set", on_error="skip").train
    np.testing.assert_array_equal(all_rows(train)["image"][-2:], pixels(2, (20, 20)))


def test_a_shard_cut_between_samples_is_refused(tmp_path, opened):
    path = tmp_path / "a.tar"
    whole = tar_of(samples_of(pixels(2), [0, 1]))
    path.write_bytes(whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512])
    with pytest.raises(ValueError, match=r"a\.tar is not a tar archive, or cut off \(no end mark\): .*on_error=skip"):
        opened(path)
    assert len(opened(path, on_error="skip").train) == 2


@pytest.mark.parametrize("name", ["00001.png", "00001.cls"])
@pytest.mark.parametrize("size", [-1024, 10**9, 10**13])
def test_a_header_of_an_absurd_size_is_refused_before_anything_is_read(tmp_path, opened, name, size):
    content = bytearray(tar_of(samples_of(pixels(2), [0, 1])))
    start = content.index(name.encode())
    member = tarfile.TarInfo(name)
    member.size = size
    content[start : start + 512] = member.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(2 * 10**9)  # a hole, so that the first size fits into the file
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=r"a\.tar .*: correct it, or leave it out with data\.on_error=skip") as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert psutil.Process().memory_info().rss < before + 200e6


@pytest.mark.parametrize("label", ["-1", "3"])
def test_a_label_outside_the_declared_classes_names_its_sample(tmp_path, opened, label):
    path = write(tmp_path / "a.tar", samples_of(pixels(6), [0, 1, 2, 0, label, 1]))
    with pytest.raises(ValueError, match=rf"a\.tar sample '0*4' has label {label}, outside 0\.\.2: correct the label"):
        opened(path, num_classes=3, validation_fraction=0.2)


def test_damage_inside_a_shard_is_named_or_left_out(tmp_path, opened):
    content = bytearray(tar_of(samples_of(pixels(6), range(6))))
    start = content.index(b"00003.png")
    content[start : start + 512] = b"\x55" * 512
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar is not a tar archive, or cut off \(no header at byte"):
        opened(tmp_path / "a.tar")
    assert len(opened(tmp_path / "a.tar", on_error="skip").train) == 3


def test_a_shard_that_shrinks_later_is_refused(tmp_path, opened):
    path = write(tmp_path / "a.tar", samples_of(pixels(6), range(6)))
    source = pickle.loads(pickle.dumps(opened(path).train))
    source.take(np.array([0]))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.tar (is shorter than it was|can't be read)"):
        source.take(np.array([5]))


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_a_file_that_is_not_a_tar_is_refused(tmp_path, opened, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar is not a tar archive"):
        opened(tmp_path / "a.tar")


def test_a_path_without_shards_or_samples_is_refused(tmp_path, opened):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar shard: correct data\.path"):
        opened(tmp_path / "set")
    (tmp_path / "set" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unpack a\.tar\.gz first, a compressed tar can't be read by id"):
        opened(tmp_path / "set")
    with pytest.raises(ValueError, match=r"does not exist: correct it; give the folder, and set data\.train_shards"):
        opened(tmp_path / "set" / "train-{0000..0009}.tar")
    with pytest.raises(ValueError, match="hold no samples"):
        opened(write(tmp_path / "empty.tar", []))
    with pytest.raises(ValueError, match=r"data\.on_error = 'skpi': did you mean 'skip'"):
        opened(tmp_path, on_error="skpi")


def test_members_that_are_apart_are_not_one_sample(tmp_path, opened):
    image = encode_image(pixels(1)[0])
    path = write(tmp_path / "a.tar", [("0.png", image), ("1.png", image), ("0.cls", b"0"), ("1.cls", b"1")])
    with pytest.raises(ValueError, match="sample '0' has no label"):
        opened(path)


def test_the_fingerprint_covers_whole_images_even_if_times_are_restored(tmp_path, opened, monkeypatch):
    whole = encode_image(pixels(1, (64, 48))[0], "BMP")
    changed = whole[:-1] + bytes([whole[-1] ^ 1])
    path = write(tmp_path / "a.tar", [("0.bmp", whole), ("0.cls", b"0")])
    before, fingerprint = path.stat(), opened(path).train.fingerprint
    time.sleep(0.02)  # longer than the clock of a file system ticks
    write(path, [("0.bmp", changed), ("0.cls", b"0")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert opened(path).train.fingerprint != fingerprint
    monkeypatch.setattr(webdataset_rows, "WHOLE_BYTES", 1000)
    beginnings = opened(path).train.fingerprint
    assert opened(write(tmp_path / "b.tar", [("0.bmp", whole), ("0.cls", b"0")])).train.fingerprint == beginnings
