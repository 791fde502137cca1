"""Map-style torch Datasets as sources."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData, ImageFolder

from rayprune.errors import DataError
from rayprune.sources import from_torch, open_data
from tests.support.sources import all_rows, pixels


class Items(Dataset):
    """The items of a list."""

    def __init__(self, items, **attributes):
        self.items = items
        vars(self).update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, position):
        return self.items[position]


class Counted(Items):
    """Counts the items read."""

    num_read = 0

    def __getitem__(self, position):
        self.num_read += 1
        return self.items[position]


class Flipped(Items):
    """Flips each image with even odds."""

    def __getitem__(self, position):
        image, label = self.items[position]
        return (image[:, ::-1] if torch.rand(()) < 0.5 else image).copy(), label


def image_items(count=6):
    return [(image, row % 3) for row, image in enumerate(pixels(count))]


def test_a_folder_of_images_is_read(tmp_path):
    for row, (image, label) in enumerate(image_items()):
        folder = tmp_path / ["cat", "größe", "owl"][label]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{row}.png")
    dataset = ImageFolder(tmp_path)
    source = pickle.loads(pickle.dumps(from_torch(dataset)))
    schema = source.schema
    assert (schema.input, schema.num_classes, schema.class_names) == ("image", 3, ("cat", "größe", "owl"))
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    taken = source.take(np.array([5, 0, 5]))
    np.testing.assert_array_equal(taken["image"], pixels(6)[[5, 0, 5]])
    assert taken["image"].flags.c_contiguous
    assert taken["label"].tolist() == [2, 0, 2]
    assert source.take(np.array([], np.int64))["image"].shape == (0, 5, 6, 3)
    with pytest.raises(ValueError, match="first 6"):
        source.take(np.array([6]))
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert from_torch(ImageFolder(moved)).fingerprint == source.fingerprint


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image,
        Image.fromarray,
        lambda image: torch.from_numpy(image).permute(2, 0, 1),
        lambda image: image.transpose(2, 0, 1),
    ],
)
def test_images_of_any_kind_are_height_width_channels(convert):
    source = from_torch(Items([(convert(image), label) for image, label in image_items()]))
    assert source.schema.input == "image"
    np.testing.assert_array_equal(all_rows(source)["image"], pixels(6))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("P", 3), ("RGBA", 3), ("1", 1)])
def test_modes_are_gray_or_rgb(mode, channels):
    image = Image.fromarray(pixels(1)[0]).convert(mode)
    assert from_torch(Items([(image, 0)])).schema.columns["image"].shape == (5, 6, channels)


def test_a_tensor_of_three_rows_has_its_channels_first():
    source = from_torch(Items([(torch.zeros(3, 8, 3, dtype=torch.uint8), 0)]))
    assert source.schema.columns["image"].shape == (8, 3, 3)


def test_tensors_become_float32_features():
    features, labels = torch.rand(10, 4, dtype=torch.float64), torch.arange(10) % 2
    source = from_torch(TensorDataset(features, labels))
    assert (source.schema.input, source.schema.columns["features"].dtype) == ("features", "float32")
    np.testing.assert_array_equal(all_rows(source)["features"], features.numpy().astype(np.float32))
    assert source.labels.tolist() == labels.tolist()


def test_columns_are_named_by_the_user():
    items = [{"image": torch.rand(3, 4, 4), "mask": np.ones((4, 4), bool), "label": 0.5, "name": "a"} for _ in range(3)]
    with pytest.raises(ValueError, match="Items item 0 column 'name' is text: return numbers, or leave it out"):
        from_torch(Items(items))
    source = from_torch(Items(items), columns=("image", "mask", "label"))
    kinds = {name: (column.shape, column.dtype) for name, column in source.schema.columns.items()}
    assert kinds == {"image": ((3, 4, 4), "float32"), "mask": ((4, 4), "bool"), "label": ((), "float64")}
    assert (source.schema.input, source.schema.num_classes) == ("", None)
    with pytest.raises(ValueError, match="have no whole number called 'label'"):
        source.labels  # noqa: B018
    triple = from_torch(Items([(np.zeros(2), np.ones(3), 1)]), columns=("left", "right", "label"))
    assert set(all_rows(triple)) == {"left", "right", "label"}
    assert len(from_torch(Items([torch.zeros(3)])).schema.columns) == 1


def test_labels_come_from_the_attribute_if_it_fits(caplog):
    items = image_items(400)
    labels = [label for _, label in items]
    stored = Counted(items, targets=torch.tensor(labels))
    assert from_torch(stored).labels.tolist() == labels
    assert stored.num_read < 400
    with caplog.at_level(logging.INFO):
        others = Counted(items, targets=[2 - label for label in labels])
        assert from_torch(others).labels.tolist() == labels
    assert "reading all 400 items of Counted for their labels" in caplog.text
    chosen = Subset(Counted(items, labels=labels), [5, 1, 1])
    source = from_torch(chosen)
    assert source.labels.tolist() == [2, 1, 1]
    np.testing.assert_array_equal(all_rows(source)["image"], pixels(400)[[5, 1, 1]])


def test_batches_are_requested_if_the_dataset_has_getitems():
    class Batched(Items):
        def __getitem__(self, position):
            raise AssertionError("one item was read")

        def __getitems__(self, positions):
            return [self.items[position] for position in positions]

    np.testing.assert_array_equal(all_rows(from_torch(Batched(image_items())))["image"], pixels(6))


def test_a_batch_of_another_length_is_refused():
    class Short(Items):
        def __getitems__(self, positions):
            return [self.items[position] for position in positions[1:]]

    with pytest.raises(DataError, match=r"__getitems__ gave \d+ items for \d+ positions"):
        all_rows(from_torch(Short(image_items())))


def test_the_fingerprint_changes_with_the_content():
    items = image_items()
    fingerprint = from_torch(Items(items)).fingerprint
    assert from_torch(Items(list(items))).fingerprint == fingerprint
    assert from_torch(Items(items[1:] + items[:1])).fingerprint != fingerprint
    assert from_torch(Items(items[:5])).fingerprint != fingerprint
    changed = [(image.copy(), label) for image, label in items]
    changed[3][0][0, 0, 0] ^= 1
    assert from_torch(Items(changed)).fingerprint != fingerprint


def test_random_items_are_reported(caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        source = from_torch(Flipped(image_items(40)), cache="auto", cache_dir=str(tmp_path))
    assert "items of Flipped differ at each visit" in caplog.text
    assert source.fingerprint == from_torch(Flipped(image_items(40))).fingerprint
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="Flipped can't be kept, its items differ at each visit: set it to none"):
        from_torch(Flipped(image_items(40)), cache="disk")


def test_items_are_kept_once_decoded(tmp_path):
    dataset = Counted(image_items(40), targets=[row % 3 for row in range(40)])
    source = from_torch(dataset, cache="disk", cache_dir=str(tmp_path))
    source.prepare()
    read = dataset.num_read
    np.testing.assert_array_equal(all_rows(source)["image"], pixels(40))
    assert dataset.num_read == read
    assert source.fingerprint == from_torch(dataset).fingerprint


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "Items is empty"),
        (
            [(pixels(1)[0], 0), (pixels(1, (9, 4))[0], 1)],
            r"item 1 column 'image' is uint8 \(4, 9, 3\) and .* item 0 uint8 \(5, 6, 3\)",
        ),
        (
            [(np.zeros(2), 0), (np.zeros(2), 1.5)],
            r"item 1 column 'label' is float64 \(\) and that of item 0 int64 \(\)",
        ),
        ([{"x": 1, "label": 0}, {"y": 1, "label": 0}], r"item 1 has columns \['label', 'y'\]"),
        ([(np.zeros(2), "cat")], "item 0 column 'label' is text"),
        ([(np.zeros(2), [[1], [1, 2]])], "item 0 column 'label' is not an array"),
        ([(np.zeros(2), None)], "item 0 column 'label' is NoneType"),
        ([(1, 2, 3)], "item 0 has 3 entries: name them with columns"),
        ([{"id": 1, "label": 0}], "item 0 has a column 'id', a name that rayprune adds itself"),
        ([(torch.zeros(2, dtype=torch.bfloat16), 0)], "item 0 column 'features' is not an array"),
        ([(Image.fromarray(np.zeros((4, 4), np.uint16)), 0)], "item 0 column 'image' is an image of mode I;16"),
        ([(np.zeros(2), -1)], "labels must be at least 0"),
        ([(np.zeros(2), 2**40)], r"labels must be below 2\*\*31"),
    ],
)
def test_unsuitable_items_are_refused(items, message):
    with pytest.raises(ValueError, match=message) as caught:
        from_torch(Items(items))
    assert "\n" not in str(caught.value)


def test_columns_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="item 0 has 2 entries and columns are"):
        from_torch(Items(image_items()), columns=("image",))
    with pytest.raises(ValueError, match="item 0 has no column 'imgae': did you mean 'image'"):
        from_torch(Items([{"image": 1}]), columns=("imgae",))


MODULE = """
import numpy as np, torch
from torch.utils.data import TensorDataset
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

def vectors(count=20, validation=None):
    train = TensorDataset(torch.rand(count, 3, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 2)
    validation_part = TensorDataset(torch.rand(validation or 1, 3), torch.zeros(validation or 1, dtype=torch.int64))
    return (train, validation_part) if validation else train

def floats():
    return FakeData(4, (3, 8, 8), 2, ToTensor())
"""


def test_a_function_in_the_config_returns_the_dataset(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    keys = {"cache_dir": str(tmp_path / "cache"), "dataset": f"{tmp_path / 'mine.py'}:vectors"}
    splits = open_data("torch_dataset", validation_fraction=0.2, **keys)
    assert (len(splits.train), len(splits.validation)) == (16, 4)
    splits = open_data("torch_dataset", options={"count": 6, "validation": 3}, limit=5, **keys)
    assert (len(splits.train), len(splits.validation)) == (5, 3)
    with pytest.raises(
        ValueError, match=r"can't be called with data\.options \(got an unexpected keyword argument 'cuont'"
    ):
        open_data("torch_dataset", options={"cuont": 6}, **keys)
    with pytest.raises(ValueError, match=r"gives .*'image': .*return uint8 images \(PIL or PILToTensor rather than"):
        open_data("torch_dataset", dataset=f"{tmp_path / 'mine.py'}:floats", cache="none")
    with pytest.raises(ValueError, match=r"data\.dataset 'vectors' is not a reference"):
        open_data("torch_dataset", dataset="vectors")


def test_torchvision_transforms_are_applied():
    source = from_torch(FakeData(8, (3, 12, 10), 3, transforms.PILToTensor()))
    assert source.schema.columns["image"].shape == (12, 10, 3)
    assert len(source.labels) == 8


class Stream(IterableDataset):
    """A dataset without positions."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(range(3))


def test_a_stream_is_not_a_map_style_dataset():
    with pytest.raises(ValueError, match="Stream is not a map-style Dataset: give one with __len__ and __getitem__"):
        from_torch(Stream())


def test_an_item_whose_label_changes_is_refused():
    items = image_items(400)
    labels = [label for _, label in items]
    items[102] = (items[102][0], 9)  # not among the 256 of the fingerprint
    source = from_torch(Items(items, targets=labels))
    for known in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(ValueError, match="Items item 102 has label 9 and its targets say 0: correct them, or"):
            known.take(np.array([3, 102, 102]))
        known.take(np.array([3, 101]))
    changing = Items(image_items(40))
    source = from_torch(changing)
    changing.items[5] = (changing.items[5][0], 1)
    with pytest.raises(ValueError, match="Items item 5 has label 1 and had before 2: give each item one label"):
        all_rows(source)


INTEGERS = """
import torch
from torch.utils.data import TensorDataset

def integers():
    return TensorDataset(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([0, 1, 0]))
"""


def test_features_are_float32(tmp_path):
    assert from_torch(Items([(np.ones(2, np.float64), 0)])).schema.columns["features"].dtype == "float32"
    assert from_torch(Items([(np.ones(2, np.int64), 0)])).schema.input == "features"
    (tmp_path / "mine.py").write_text(INTEGERS)
    reference = f"{tmp_path / 'mine.py'}:integers"
    train = open_data("torch_dataset", dataset=reference, cache="none", validation_fraction=0).train
    assert (train.schema.input, train.schema.columns["features"].dtype) == ("features", "float32")
    assert all_rows(train)["features"].tolist() == [[1, 2], [3, 4], [5, 6]]
