"""Image files in class folders, and ImageNet: layouts, formats, damaged files, remote paths."""

from __future__ import annotations

import logging
import pickle
import struct
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from rayprune.sources import default_augment, open_data
from rayprune.sources.images import folder as image_folder
from rayprune.sources.images.decode import decode_image
from rayprune.sources.images.folder import FileNames
from rayprune.sources.views import Relabeled
from tests.support.sources import all_rows, encode_image, random_bytes, smooth_pixels


@pytest.fixture
def opened(tmp_path):
    """Open a path without holdout and, by default, without a cache."""

    def call(path, **keys):
        defaults = {"path": str(path), "cache": "none", "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0}
        return open_data("image_folder", **defaults | keys)

    return call


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def write_tree(root, counts, first_seed=0, **keys):
    """Write PNG files `<class>/<number>.png` and return their pixels in the order of the ids."""
    images = []
    for name, count in sorted(counts.items()):
        for number in range(count):
            images.append(smooth_pixels(first_seed + len(images), **keys))
            write(root / name / f"{number:03}.png", encode_image(images[-1]))
    return np.stack(images)


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "test"])
def test_training_and_validation_folders_are_found(tmp_path, opened, validation):
    images = write_tree(tmp_path / "data" / "train", {"owl": 3, "cat": 2, "dog": 40})
    others = write_tree(tmp_path / "data" / validation, {"owl": 2, "cat": 1}, 100)
    splits = opened(tmp_path / "data")
    assert splits.train.schema.class_names == splits.validation.schema.class_names == ("cat", "dog", "owl")
    np.testing.assert_array_equal(splits.train.labels, [0] * 2 + [1] * 40 + [2] * 3)
    np.testing.assert_array_equal(splits.validation.labels, [0, 2, 2])
    np.testing.assert_array_equal(all_rows(splits.train)["image"], images)
    np.testing.assert_array_equal(all_rows(splits.validation)["image"], others)
    assert splits.train.fingerprint != splits.validation.fingerprint
    ids = np.array([44, 0, 44, 7])
    taken, num_bytes = splits.train.read(ids)
    np.testing.assert_array_equal(taken["image"], images[ids])
    np.testing.assert_array_equal(taken["label"], [2, 0, 2, 1])
    assert taken["image"].flags.c_contiguous
    sizes = [path.stat().st_size for path in sorted((tmp_path / "data" / "train").rglob("*.png"))]
    assert num_bytes == sum(sizes[sample] for sample in ids)
    assert splits.train.row_cost == "expensive"
    with pytest.raises(ValueError, match="first 45"):
        splits.train.take(np.array([45]))


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
def test_samples_know_their_files_through_caches_and_views(tmp_path, opened, cache):
    write_tree(tmp_path / "data" / "train", {"owl": 3, "cat": 2, "dog": 20})
    splits = opened(tmp_path / "data", cache=cache, limit=20, hold_out=0.2)
    names = [f"{name}/{number:03}.png" for name, count in (("cat", 2), ("dog", 18)) for number in range(count)]
    for part in (splits.train, splits.validation):
        for sample in range(len(part)):
            file = Path(part.file_of(sample))
            np.testing.assert_array_equal(np.asarray(Image.open(file)), part.take(np.array([sample]))["image"][0])
            assert file.relative_to(tmp_path / "data" / "train").as_posix() in names
    relabeled = Relabeled(splits.train, splits.train.labels)
    assert relabeled.file_of(3) == splits.train.file_of(3)


def test_classes_directly_below_the_path_are_held_out(tmp_path, opened):
    write_tree(tmp_path, {"a": 30, "b": 20})
    splits = opened(tmp_path, validation_fraction=0.1)
    assert (len(splits.train), len(splits.validation)) == (45, 5)
    assert np.bincount(splits.validation.labels).tolist() == [3, 2]
    again = opened(tmp_path, validation_fraction=0.1)
    assert again.validation.fingerprint == splits.validation.fingerprint


def test_folders_may_have_other_names(tmp_path, opened):
    write_tree(tmp_path / "learn" / "now", {"a": 2, "b": 2})
    write_tree(tmp_path / "check", {"a": 1, "b": 1}, 50)
    splits = opened(tmp_path, train="learn/now", validation="check/")
    assert (len(splits.train), len(splits.validation)) == (4, 2)
    write_tree(tmp_path / "learn" / "val", {"a": 1})
    assert opened(tmp_path / "learn", train="now", validation="").validation is None
    with pytest.raises(ValueError, match=r"exam holds no images in class folders .*correct data\.path"):
        opened(tmp_path, train="check", validation="exam")


def test_validation_folder_alone_is_refused(tmp_path, opened):
    write_tree(tmp_path / "val", {"a": 2, "b": 2})
    with pytest.raises(ValueError, match=r"holds images in val only: set data\.train"):
        opened(tmp_path)
    assert len(opened(tmp_path, train="val").train) == 4


def test_only_image_files_count_at_any_depth_below_the_class(tmp_path, opened):
    data = encode_image(smooth_pixels())
    for name in ("a/1.PNG", "a/deep/er/2.png", "b c/ü 3.Png", "b c/deep/.hidden.png", "b c/.cache/4.png", ".git/5.png"):
        write(tmp_path / name, data)
    for name in ("a/notes.txt", "top.png", "b c/png"):
        write(tmp_path / name, b"text")
    train = opened(tmp_path).train
    assert train.schema.class_names == ("a", "b c")
    np.testing.assert_array_equal(train.labels, [0, 0, 1])
    np.testing.assert_array_equal(all_rows(train)["image"], [smooth_pixels()] * 3)


def test_unicode_and_spaces_in_the_path_a_class_of_one_and_an_empty_folder(tmp_path, opened, caplog):
    root = tmp_path / "Ü ber % 20#é"
    write_tree(root / "train", {"a": 3, "naïve klass": 1, "b?": 2})
    write_tree(root / "val", {"a": 1}, 30)
    (root / "train" / "empty").mkdir()
    with caplog.at_level(logging.WARNING):
        splits = opened(root)
    assert splits.train.schema.class_names == ("a", "b?", "naïve klass")
    assert len(all_rows(splits.train)["image"]) == 6
    assert "1 folders in" in caplog.text
    assert "first empty" in caplog.text
    assert len(opened(root / "train", validation_fraction=0.3).validation) == 2


def test_class_without_training_image_is_refused(tmp_path, opened):
    write_tree(tmp_path / "train", {"a": 1, "b": 1})
    write_tree(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match=r"val/c is a class without a training image \(000\.png\)"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_formats_are_decoded_as_by_pillow(tmp_path, opened, kind):
    suffix = {"JPEG": "jpeg", "TIFF": "tif"}.get(kind, kind.lower())
    data = [encode_image(smooth_pixels(seed, (17, 9)), kind) for seed in range(70)]
    for number, content in enumerate(data):
        write(tmp_path / "a" / f"{number:02}.{suffix}", content)
    images = all_rows(opened(tmp_path).train)["image"].astype(int)
    expected = np.stack([decode_image(content, 3) for content in data])
    # Two builds of libjpeg-turbo may round differently.
    assert np.abs(images - expected).max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("first", "expected"),
    [("L", (5, 6, 1)), ("1", (5, 6, 1)), ("P", (5, 6, 3)), ("RGBA", (5, 6, 3)), ("LA", (5, 6, 1))],
)
def test_the_first_image_decides_the_mode(tmp_path, opened, first, expected):
    modes = [first, "L", "P", "RGBA", "RGB"]
    data = [encode_image(smooth_pixels(seed), mode=mode) for seed, mode in enumerate(modes)]
    for number, content in enumerate(data):
        write(tmp_path / "a" / f"{number}.png", content)
    train = opened(tmp_path).train
    assert train.schema.columns["image"].shape == expected
    decoded = np.stack([decode_image(content, expected[2]) for content in data])
    np.testing.assert_array_equal(all_rows(train)["image"], decoded)
    assert opened(tmp_path, num_channels=4 - expected[2]).train.schema.columns["image"].shape == (5, 6, 4 - expected[2])


def test_sixteen_bits_are_refused_by_name(tmp_path, opened):
    deep = encode_image(np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000)
    write(tmp_path / "a" / "1.png", encode_image(smooth_pixels(channels=1)))
    write(tmp_path / "a" / "2.png", deep)
    with pytest.raises(ValueError, match=r"a/2\.png has image mode I.* 8 bits per channel: convert"):
        all_rows(opened(tmp_path).train)
    with pytest.raises(ValueError, match=r"a/2\.png has image mode I"):
        opened(tmp_path, on_error="skip")
    write(tmp_path / "a" / "0.png", deep)
    with pytest.raises(ValueError, match=r"a/0\.png has image mode I"):
        opened(tmp_path)


def test_mixed_sizes_need_image_size(tmp_path, opened):
    write(tmp_path / "a" / "1.png", encode_image(smooth_pixels(1, (8, 6))))
    write(tmp_path / "a" / "2.jpg", encode_image(smooth_pixels(2, (40, 30)), "JPEG"))
    write(tmp_path / "b" / "3.jpg", encode_image(smooth_pixels(3, (9, 12)), "JPEG"))
    with pytest.raises(ValueError, match=r"a/2\.jpg is an image of 40×30 pixels .* 8×6: set data\.image_size=6"):
        all_rows(opened(tmp_path).train)
    train = opened(tmp_path, image_size=7).train
    assert train.schema.columns["image"].shape == (7, 7, 3)
    files = sorted(tmp_path.rglob("*.*g"), key=lambda file: file.name)
    expected = np.stack([decode_image(file.read_bytes(), 3, 7) for file in files])
    assert np.abs(all_rows(train)["image"].astype(int) - expected).max() <= 2
    assert train.fingerprint != opened(tmp_path, image_size=6).train.fingerprint


def test_damaged_files_are_named(tmp_path, opened):
    write_tree(tmp_path, {"a": 3})
    whole = encode_image(smooth_pixels(size=(64, 64)), "JPEG")
    for content, reason in ((b"GIF", "no known image format"), (whole[:-100], "truncated")):
        write(tmp_path / "b" / "bad.jpg", content)
        with pytest.raises(ValueError, match=rf"(?i)b/bad\.jpg is not a readable image \(.*{reason}.*on_error=skip"):
            all_rows(opened(tmp_path).train)
    write(tmp_path / "b" / "bad.jpg", b"")
    with pytest.raises(ValueError, match=r"b/bad\.jpg is empty: restore it, or leave it out with data\.on_error=skip"):
        opened(tmp_path)


@pytest.mark.parametrize("cache", ["none", "auto"])
def test_damaged_files_are_left_out(tmp_path, opened, caplog, cache):
    images = write_tree(tmp_path / "data", {"a": 3, "b": 40})
    whole = encode_image(smooth_pixels(size=(6, 5)))
    write(tmp_path / "data" / "a" / "!first.png", b"")
    truncated = write(tmp_path / "data" / "b" / "020x.png", whole[:60])
    with caplog.at_level(logging.WARNING):
        train = opened(tmp_path / "data", on_error="skip", cache=cache).train
    assert "left out 2 of 45 samples that can't be read, first: a/!first.png, b/020x.png" in caplog.text
    np.testing.assert_array_equal(all_rows(train)["image"], images)
    np.testing.assert_array_equal(train.labels, [0] * 3 + [1] * 40)
    assert opened(tmp_path / "data", on_error="skip", cache=cache).train.fingerprint == train.fingerprint
    truncated.write_bytes(whole)
    assert len(opened(tmp_path / "data", on_error="skip", cache=cache).train) == 44


def test_nothing_readable_is_refused(tmp_path, opened):
    write(tmp_path / "a" / "1.png", b"text")
    with pytest.raises(ValueError, match="holds no readable image"):
        opened(tmp_path, on_error="skip")
    with pytest.raises(ValueError, match=r"a/1\.png is not a readable image"):
        opened(tmp_path)


def test_missing_folders_and_files_are_named(tmp_path, opened):
    with pytest.raises(ValueError, match=r"nowhere' is not a folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no images in class folders \(<class>/<image>, of bmp"):
        opened(tmp_path)
    write_tree(tmp_path, {"a": 2})
    train = opened(tmp_path).train
    (tmp_path / "a" / "001.png").unlink()
    with pytest.raises(ValueError, match=r"a/001\.png is not a readable image \(No such file or directory\)"):
        all_rows(train)


def test_a_path_on_another_file_system(opened):
    memory = fsspec.filesystem("memory")
    data = [encode_image(smooth_pixels(seed)) for seed in range(40)]
    for number, content in enumerate(data):
        memory.pipe(f"/ü bucket/set/train/{'ab'[number % 2]}/{number:02}.png", content)
    memory.pipe("/ü bucket/set/val/b/1.png", data[0])
    splits = opened("memory://ü bucket/set")
    order = [*range(0, 40, 2), *range(1, 40, 2)]
    taken, num_bytes = splits.train.read(np.arange(40))
    np.testing.assert_array_equal(taken["image"], [smooth_pixels(seed) for seed in order])
    assert num_bytes == sum(map(len, data))
    assert splits.validation.labels.tolist() == [1]
    assert all_rows(pickle.loads(pickle.dumps(splits.train)))["label"].tolist() == [0] * 20 + [1] * 20


def test_fingerprint_follows_content_not_place(tmp_path, opened):
    for place in ("one", "two"):
        write_tree(tmp_path / place, {"a": 400, "b": 200})
    train = opened(tmp_path / "one").train
    assert opened(tmp_path / "two").train.fingerprint == train.fingerprint
    seen = {train.fingerprint}
    file = tmp_path / "two" / "a" / "123.png"
    file.write_bytes(file.read_bytes() + b"\0")  # another size
    seen.add(opened(tmp_path / "two").train.fingerprint)
    file.rename(tmp_path / "two" / "b" / "123x.png")  # another label
    seen.add(opened(tmp_path / "two").train.fingerprint)
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "B")  # another order
    seen.add(opened(tmp_path / "two").train.fingerprint)
    first = tmp_path / "one" / "a" / "000.png"
    first.write_bytes(first.read_bytes()[:-1] + b"\1")  # content of the same size, in a file that is sampled
    seen.add(opened(tmp_path / "one").train.fingerprint)
    assert len(seen) == 5


def test_pickle_is_small_and_reads_the_same(tmp_path, opened):
    write_tree(tmp_path, {"class one": 600, "class two": 600})
    train = opened(tmp_path).train
    pickled = pickle.dumps(train)
    assert len(pickled) < 8_000
    again = pickle.loads(pickled)
    ids = np.array([1199, 0, 600])
    np.testing.assert_array_equal(again.take(ids)["image"], train.take(ids)["image"])
    np.testing.assert_array_equal(again.labels, train.labels)
    assert again.fingerprint == train.fingerprint


def test_packed_file_names_are_read_back():
    names = ["", "a/ü 1.png", "line\nbreak", "𝛼/x"]
    packed = pickle.loads(pickle.dumps(FileNames(names)))
    assert [packed[position] for position in range(len(names))] == names


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cache", "dsk", r"data\.cache = 'dsk': did you mean 'disk'"),
        ("on_error", "skp", r"data\.on_error = 'skp': did you mean 'skip'"),
        ("image_size", 0, r"data\.image_size is 0"),
        ("num_channels", 2, r"data\.num_channels = 2: must be 1, 3 or null"),
        ("imagesize", 2, r"unknown key 'data\.imagesize'.*did you mean 'image_size'"),
    ],
)
def test_keys_are_checked(tmp_path, opened, key, value, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **{key: value})


def png_of(lines, width, bits=8, color=2):
    """Return a PNG of lines that start with their filter bytes."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, len(lines), bits, color, 0, 0, 0)
    stream = zlib.compress(b"".join(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


@pytest.mark.parametrize("damage", ["flipped byte", "wrong filter"])
def test_damaged_png_is_named_or_left_out(tmp_path, opened, damage):
    write_tree(tmp_path / "set", {"a": 3, "b": 3}, size=(48, 48))
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    content = encode_image(noise)
    if damage == "flipped byte":
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
    else:
        lines = [
            bytes([9 if damage == "wrong filter" and row == 20 else 0]) + noise[row].tobytes() for row in range(48)
        ]
        content = png_of(lines, 48)
    write(tmp_path / "set" / "a" / "001.png", content)
    whole = opened(tmp_path / "set").train
    with pytest.raises(ValueError, match=r"a/001\.png is not a readable image"):
        whole.take(np.arange(6))
    source = opened(tmp_path / "set", on_error="skip").train
    assert len(source) == 5
    assert source.take(np.arange(5))["label"].tolist() == [0, 0, 1, 1, 1]


def test_the_fingerprint_counts_every_file(tmp_path, opened, monkeypatch):
    for number in range(300):
        write(tmp_path / "set" / "a" / f"{number:03}.bmp", encode_image(np.zeros((2, 2, 3), np.uint8), "BMP"))
    fingerprint = opened(tmp_path / "set").train.fingerprint
    changed = encode_image(np.ones((2, 2, 3), np.uint8), "BMP")
    found = set()
    for number in (1, 6, 7, 13, 298):
        kept = (tmp_path / "set" / "a" / f"{number:03}.bmp").read_bytes()
        write(tmp_path / "set" / "a" / f"{number:03}.bmp", changed)
        found.add(opened(tmp_path / "set").train.fingerprint)
        write(tmp_path / "set" / "a" / f"{number:03}.bmp", kept)
    assert len(found) == 5
    assert fingerprint not in found
    monkeypatch.setattr(image_folder, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(image_folder, "SAMPLED_FILES", 2)
    fingerprint = opened(tmp_path / "set").train.fingerprint
    write(tmp_path / "set" / "a" / "007.bmp", changed)
    assert opened(tmp_path / "set").train.fingerprint == fingerprint


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_pngs_of_16_bits_are_refused_in_color_too(tmp_path, opened, color, channels):
    write(tmp_path / "set" / "a" / "0.png", png_of([bytes(1 + 5 * 2 * channels)] * 4, 5, 16, color))
    with pytest.raises(ValueError, match=r"a/0\.png has image mode .*16, more than 8 bits per channel: convert"):
        opened(tmp_path / "set")


@pytest.mark.parametrize("tops", [("Train", "Test"), ("training", "testing"), ("TRAIN",), ("training", "dev")])
def test_splits_of_another_spelling_are_not_classes(tmp_path, opened, tops):
    for top in tops:
        write_tree(tmp_path / "set" / top, {"cat": 1, "dog": 2})
    with pytest.raises(
        ValueError, match=r"are splits rather than classes: set data\.train and data\.validation"
    ) as caught:
        opened(tmp_path / "set")
    assert all(top in str(caught.value) for top in tops)
    splits = opened(tmp_path / "set", train=tops[0], validation=tops[1] if len(tops) > 1 else "")
    assert splits.train.schema.class_names == ("cat", "dog")
    assert opened(tmp_path / "set", train="").train.schema.class_names == tuple(sorted(tops))


def test_classes_called_like_splits_are_classes_without_folders_below(tmp_path, opened):
    write_tree(tmp_path / "flat", {"Train": 1, "Test": 2})
    assert opened(tmp_path / "flat").train.schema.class_names == ("Test", "Train")
    for top in ("training", "bus"):
        write_tree(tmp_path / "deep" / top, {"near": 1, "far": 1})
    assert opened(tmp_path / "deep").train.schema.class_names == ("bus", "training")


def write_imagenet(root):
    for part, count in (("train", 3), ("val", 1)):
        for seed, wnid in enumerate(("n02119789", "n01440764")):
            (root / part / wnid).mkdir(parents=True)
            for number in range(count):
                size = (60 + 7 * number, 40 + 9 * number)
                picture = Image.fromarray(random_bytes(4, 4, 3, seed=seed)).resize(size)
                mode = "L" if number == 1 else "RGB"
                picture.convert(mode).save(root / part / wnid / f"{wnid}_{number}.JPEG")


def test_imagenet_is_read_by_class_folder(tmp_path):
    write_imagenet(tmp_path)
    splits = open_data("imagenet", path=str(tmp_path), cache="none", image_size=32)
    assert (len(splits.train), len(splits.validation)) == (6, 2)
    assert splits.train.schema.class_names == ("n01440764", "n02119789")
    assert all_rows(splits.train)["image"].shape == (6, 32, 32, 3)
    assert splits.validation.labels.tolist() == [0, 1]
    whole = open_data("imagenet", path=str(tmp_path), cache="none").train
    assert whole.schema.columns["image"].shape == (224, 224, 3)
    assert default_augment("imagenet") == {"crop": 0, "flip": True}


def test_imagenet_folders_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"train is missing: ImageNet can't be downloaded, get .* image-net\.org"):
        open_data("imagenet", path=str(tmp_path))
    write_imagenet(tmp_path)
    with pytest.raises(ValueError, match=r"data\.download is true: ImageNet can't be downloaded"):
        open_data("imagenet", path=str(tmp_path), download=True)
    (tmp_path / "val").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="val is missing"):
        open_data("imagenet", path=str(tmp_path))
