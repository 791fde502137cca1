"""Every published setting in configs/recipes: its comment, its network at full size, and two steps on random images.

For time's sake, networks run at their full size without data (on torch's meta device), and then train on 16 pixels
instead of CIFAR's 32, and on 40 instead of ImageNet's 224. The steps are the engine's own, without the run around them.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from rayprune.config import Config, load_config, make_config
from rayprune.config.shipped import shipped_configs
from rayprune.core import Selector
from rayprune.core.validation import check_keys
from rayprune.engine.train.build import StepSettings, build_network, build_step, rate_at
from rayprune.engine.train.preflight import input_spec
from rayprune.nn.augment import channels_first
from rayprune.nn.models import build_model
from rayprune.nn.steps.in_batch import PICKED
from rayprune.nn.steps.plain import BatchPlace
from rayprune.sources import SOURCES, SampleSource, open_data
from tests.support.paths import ROOT
from tests.support.sources import random_bytes

CPU = torch.device("cpu")
RECIPES = {name: file for name, file in shipped_configs().items() if file.parent.name == "recipes"}
# Dataset → classes, side of the network's input; of the two steps: samples, side of the stored images.
DATASETS = {"cifar10": (10, 32, 4, 16), "cifar100": (100, 32, 4, 16), "imagenet": (1000, 224, 4, 48)}
# Keys of methods with which they select from the second epoch on, or score in three where they compare epochs.
SHORT = {"anneal_start": 1.0, "block_epochs": 1, "score_epochs": 3, "trajectory_len": 3, "window_size": 3, "also": []}
SHORT |= {"clusters": 2}


def dataset(name: str) -> str:
    return name.split("_")[0]


def test_there_are_recipes_for_every_dataset() -> None:
    assert {dataset(name) for name in RECIPES} == set(DATASETS)
    assert sorted(RECIPES) == sorted(file.stem for file in (ROOT / "configs" / "recipes").iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_the_comment_has_the_published_number_and_its_source(name: str) -> None:
    comment = re.match(r"(#.*\n)+", RECIPES[name].read_text())
    assert comment is not None
    found = re.fullmatch(
        r"# [^\n]+[.?]\n# Published: (.+?)\n# Source: (.+?)\n(# Differs: .+?\n)?#   rayprune .+", comment[0], re.S
    )
    assert found is not None
    assert re.search(r"\d %|no accurac", found[1])
    assert re.search(r"20\d\d|tables of papers", found[2])
    assert max(map(len, comment[0].splitlines())) <= 120
    for other in re.findall(r"\b(?:cifar|imagenet)\w*_\w+", comment[0]):
        assert other in RECIPES, f"{name} names {other}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_its_network_fits_the_data(name: str) -> None:
    config = load_config(name)
    source, keys = config.data.source, config.data.source_keys
    assert source == dataset(name)
    check_keys(SOURCES[source], keys, "data", f"source {source!r}")
    classes, side, _, _ = DATASETS[source]
    assert isinstance(config.data.augment, dict)
    assert config.data.augment.get("resized_crop", side) == side <= keys.get("image_size", side)
    shapes = output_shapes(config.model.name, json.dumps(config.model.options), classes, side)
    assert shapes == [(2, classes)] * len(shapes)
    assert (len(shapes) > 1) == (config.train.step_name == "l2w")
    if config.build_method().collect_epochs:
        assert config.scoring().last_epoch <= config.train.epochs


@cache
def output_shapes(name: str, options: str, num_classes: int, side: int) -> list[tuple[int, ...]]:
    """Return the shapes of all exits' logits of two images."""
    with torch.device("meta"):
        model = build_model(name, num_classes=num_classes, input_shape=(3, side, side), **json.loads(options))
        output = model(torch.zeros(2, 3, side, side))
    return [tuple(logits.shape) for logits in (output if isinstance(output, list) else [output])]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_selects(name: str, tmp_path: Path) -> None:
    config = stand_in(name, tmp_path)
    before, network, kept = train(config)
    after, num_samples = network.state_dict(), DATASETS[dataset(name)][2]
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert [key for key, _ in network.named_parameters() if torch.equal(after[key], before[key])] == []
    match config.method["name"]:
        case "full":
            assert set(kept) == {num_samples}
        case "dynams":
            assert kept == [num_samples, round(0.2 * num_samples)]  # together 60 % of two epochs
        case "infobatch":
            assert kept[0] == num_samples > kept[1]
        case "ies" | "kakurenbo" | "pdd" | "repb" | "seta":  # so few samples or epochs need not have one to drop
            assert kept[0] == num_samples >= kept[1] > 0
        case "divbs" | "selective_backprop":  # rows of the batch of the last epoch
            assert kept[-1] == num_samples - int((1 - config.method["keep"]) * num_samples) < num_samples
        case _:
            assert kept[-1] == num_samples - int(config.method["prune_ratio"] * num_samples) < num_samples


def stand_in(name: str, folder: Path) -> Config:
    """Return a recipe's config for two steps on random images of two classes."""
    tree = load_config(name).model_dump(mode="json")
    classes, _, count, side = DATASETS[dataset(name)]
    augment = tree["data"]["augment"] | ({"resized_crop": side - 8} if dataset(name) == "imagenet" else {})
    hold_out = None
    if tree["data"]["hold_out"]:
        hold_out, count = 2 / (count + 2), count + 2  # one more of each class, to hold out
    np.savez(folder / "images.npz", x=random_bytes(count, side, side, 3), y=np.arange(count) % 2 * (classes - 1))
    tree["data"] = {
        **{"source": "arrays", "path": str(folder / "images.npz"), "cache_dir": str(folder), "num_classes": classes},
        **{"validation_fraction": 0.0, "augment": augment, "hold_out": hold_out},
    }
    if tree["model"]["name"] == "ranet_imagenet":
        tree["model"] |= {"step": 2, "growth_rate": 8}  # 131 M parameters would take a quarter of this file's time
    tree["method"] |= {key: value for key, value in SHORT.items() if key in tree["method"]}
    if "score_epochs" in tree["method"] and "window_size" not in tree["method"]:
        tree["method"]["score_epochs"] = 2 if tree["method"]["name"] == "forgetting" else 1
    # L2W takes a step on each half of a batch.
    tree["train"]["epochs"] = 1 if tree["train"]["step"]["name"] == "l2w" else 2
    if scoring := make_config({"method": tree["method"]}).build_method().collect_epochs:
        tree["train"]["epochs"] = scoring + 1
    return make_config(tree)


def train(config: Config) -> tuple[dict[str, torch.Tensor], torch.nn.Module, list[int]]:
    """Train on the selected samples of each epoch in one batch.

    Returns:
        The initial state, the trained network, and the numbers of samples that the epochs trained on.
    """
    source = open_data(config.data.source, hold_out=config.data.hold_out, **config.data.source_keys).train
    method, spec = config.build_method(), input_spec(config, source)
    network = build_network(config, spec, CPU)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    settings = StepSettings.of(method, config)
    step = build_step(config, network, spec, settings, device=CPU)
    selector = Selector(method, len(source), config.train.epochs, config.train.seed, labels=source.labels)
    kept = []
    for epoch in range(config.train.epochs):
        selection = selector.begin_epoch(epoch)
        kept.append(selection.num_kept)
        images, labels = read(source, selection.ids)
        shape = channels_first(tuple(images.shape[1:]))
        draws = spec.augment.draws(selection.ids, shape, seed=config.train.seed, epoch=epoch)
        assert draws is not None
        for group in step.optimizer.param_groups:
            group["lr"] = rate_at(config, epoch, 0, 1, 1.0)
        inputs = spec.augment.train(images, torch.from_numpy(draws))
        weights, place = torch.from_numpy(selection.weights), ()
        if step.takes_place:
            real = np.ones(len(labels), dtype=np.bool_)
            place = (BatchPlace(epoch, 0, 1, torch.from_numpy(selection.ids), real),)
        signals = step(inputs, labels, weights, *place)
        if PICKED in signals:
            kept[-1] = int(signals[PICKED].sum())
        selector.observe(selection.ids, arrays_of(signals, settings.signals), epoch)
        if selection.num_scored:
            scored = np.arange(len(source)) if selection.scored_ids is None else selection.scored_ids
            images, labels = read(source, scored)
            names, inputs = settings.sweep_signals, spec.augment.evaluate(images)
            signals = step.evaluate(inputs, labels, smoothed=True, signals=names, part=settings.sweep_part)
            selector.observe(scored, arrays_of(signals, names), epoch, sweep=True)
    return before, network, kept


def read(source: SampleSource, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows = source.take(ids)
    return torch.from_numpy(rows["image"]), torch.from_numpy(rows["label"])


def arrays_of(signals: dict[str, torch.Tensor], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: signals[name].numpy() for name in names}
