"""ImageNet's folders, as extracted."""

from __future__ import annotations

import pytest
from PIL import Image

from rayprune.sources import default_augment, open_data
from tests.support.sources import all_rows, random_bytes


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
