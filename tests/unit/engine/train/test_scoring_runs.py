"""Scoring runs: signals of the last layer's inputs, vectors, several seeds, a pretrained embedder, class quotas."""

from __future__ import annotations

import json
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from rayprune.config import Config
from rayprune.engine.train.build import build_network
from rayprune.engine.train.driver import RunResult, open_splits, train
from rayprune.engine.train.preflight import input_spec
from rayprune.errors import ConfigError, TrainingPaused
from rayprune.nn.boundary import last_linear
from rayprune.nn.steps.embed import load_embedder
from rayprune.sources.tables.selections import read_selection_file
from tests.support.runs import run_config, same_weights, user, weights_of

NUM = 301


def static(tmp_path: Path, name: str, run: str = "run", **sections: Any) -> Config:
    method = {"name": name, "prune_ratio": 0.5, "score_epochs": 1, **sections.pop("method", {})}
    return run_config(tmp_path, run, **{"method": method, "train": {"epochs": 2}, **sections})


def forward_all(config: Config, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the errors p − onehot, the last layer's inputs and the labels of all samples, by a run's final network."""
    source = open_splits(config).train
    spec = input_spec(config, source)
    network = build_network(config, spec, torch.device("cpu"))
    network.load_state_dict(weights_of(folder))
    network.eval()
    inputs = spec.augment.evaluate(torch.from_numpy(np.array(source.take(np.arange(NUM))[spec.column])))
    found: list[torch.Tensor] = []
    layer = network.get_submodule(last_linear(network, inputs[:2]))
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        probs = network(inputs).softmax(1).numpy()
    handle.remove()
    labels = np.asarray(source.labels)
    return probs - np.eye(probs.shape[1])[labels], found[0].numpy(), labels


def scores(result: RunResult, folder: str = "collect") -> pd.DataFrame:
    return pd.read_parquet(result.folder / folder / "scores.parquet")


def kept(result: RunResult) -> list[int]:
    ids: list[int] = read_selection_file(result.folder / "selection.parquet", NUM).ids.tolist()
    return ids


def test_grand_is_the_norm_of_the_last_layers_gradient(tmp_path: Path) -> None:
    config = static(tmp_path, "grand")
    result = train(config)
    errors, inputs, _ = forward_all(config.scoring(), result.folder / "collect")
    # The gradient of weight and bias, written out.
    gradients = np.einsum("nc,nd->ncd", errors, np.concatenate([inputs, np.ones((NUM, 1))], axis=1))
    expected = np.sqrt((gradients**2).sum(axis=(1, 2)))
    np.testing.assert_allclose(scores(result)["grand"], expected, rtol=1e-4)
    assert kept(result) == np.sort(np.argsort(-scores(result)["grand"].to_numpy(), kind="stable")[:151]).tolist()
    line = json.loads((result.folder / "collect" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["samples_forwarded"] == NUM


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_embeddings_are_condensed_and_in_no_checkpoint(tmp_path: Path, storage: str) -> None:
    notices: list[str] = []
    config = static(tmp_path, user("NearTheMean"), method={"storage": storage})
    result = train(config, on_notice=notices.append)
    _, inputs, _ = forward_all(config.scoring(), result.folder / "collect")
    expected = np.linalg.norm(inputs - inputs.mean(axis=0), axis=1)
    got = scores(result)["distance"].to_numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4 if storage == "float32" else 1e-2)
    assert kept(result) == np.sort(np.argsort(got, kind="stable")[:151]).tolist()
    (line,) = [line for line in notices if "embedding" in line]
    assert f"the embedding of each sample, {inputs.shape[1]} numbers in {storage}, takes" in line


def test_vectors_that_do_not_fit_on_the_disk_are_refused_before_the_scoring_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    config, lines = static(tmp_path, user("NearTheMean")), list[dict[str, Any]]()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda folder: usage(100, 90, 10))
        with pytest.raises(ConfigError, match=r"embedding of .*: set TMPDIR to a folder with more room"):
            train(config, on_epoch=lines.append)
    assert not lines
    train(config)


def test_a_paused_scoring_run_with_vectors_ends_as_if_it_had_not_paused(tmp_path: Path) -> None:
    slow = {"model": {"name": user("faulty"), "pause_s": 0.05}, "method": {"score_epochs": 2}}
    whole = train(static(tmp_path / "whole", user("NearTheMean"), **slow))
    config, pause = static(tmp_path / "paused", user("NearTheMean"), **slow), threading.Event()
    with pytest.raises(TrainingPaused):
        train(config, pause=pause, on_epoch=lambda line: pause.set())
    resumed = train(config)
    assert kept(resumed) == kept(whole)
    assert same_weights(resumed.folder, whole.folder)


def test_the_scores_of_several_runs_are_averaged(tmp_path: Path) -> None:
    result = train(static(tmp_path, "grand", collect={"runs": 2}))
    alone = [train(static(tmp_path, "grand", f"seed{seed}", train={"epochs": 2, "seed": seed})) for seed in (0, 1)]
    mean = np.mean([scores(run)["grand"] for run in alone], axis=0)
    np.testing.assert_allclose(scores(result)["grand"], mean, rtol=1e-6)
    assert kept(result) == np.sort(np.argsort(-mean, kind="stable")[:151]).tolist()
    assert kept(result) != kept(alone[0])
    assert result.metrics[-1]["samples_collected"] == 2 * NUM
    assert result.metrics[-1]["samples_forwarded_collected"] == 2 * NUM
    with pytest.raises(ValueError, match=r"collect\.runs = 2: .*NearTheMean chooses by no single score"):
        train(static(tmp_path, user("NearTheMean"), "other", collect={"runs": 2}))


def test_a_pretrained_network_embeds_without_training(tmp_path: Path) -> None:
    config = static(tmp_path, user("NearTheMean"), collect={"embedder": user("embedder")})
    result = train(config)
    source = open_splits(config).train
    pixels = np.array(source.take(np.arange(NUM))[source.schema.input], dtype=np.float64).reshape(NUM, -1) / 255
    expected = 2.0 * np.linalg.norm(pixels - pixels.mean(axis=0), axis=1)
    np.testing.assert_allclose(scores(result)["distance"], expected, rtol=1e-4)
    line = result.metrics[-1]
    assert (line["samples_collected"], line["samples_forwarded_collected"]) == (0, NUM)
    assert not (result.folder / "collect" / "validation.parquet").exists()


@pytest.mark.parametrize(
    ("name", "method", "collect", "words"),
    [
        ("grand", {}, {"embedder": "m:f"}, "gives embeddings alone, and method 'grand' also needs others"),
        (user("NearTheMean"), {"score_epochs": 2}, {"embedder": "m:f"}, r"set method\.score_epochs=1"),
        (user("NearTheMean"), {}, {"embedder": "resnet18"}, "write torchvision:resnet18, module:function"),
        (
            user("NearTheMean"),
            {},
            {"embedder": "torchvision:resnet"},
            "unknown torchvision model 'resnet': did you mean",
        ),
        (
            user("NearTheMean"),
            {},
            {"embedder": user("flat_embedder")},
            r"returned \(2,\) for 2 samples: return \(B, D\)",
        ),
        (user("NearTheMean"), {}, {"embedder": user("empty_embedder")}, r"returned \(2, 0\) for 2 samples: return"),
        (user("NearTheMean"), {}, {"embedder": user("nan_embedder")}, "returned NaN or infinite numbers for 1 of 2"),
        (
            user("NearTheMean"),
            {},
            {"embedder": user("picky_embedder")},
            r"^collect\.embedder '.*picky_embedder' can't take a batch of 2 × \(.*\) \(RuntimeError: einsum",
        ),
        (
            user("NearTheMean"),
            {},
            {"fresh": False, "embedder": "m:f"},
            "makes no scoring run: leave out collect.embedder",
        ),
    ],
)
def test_what_cannot_embed_is_refused(
    tmp_path: Path, name: str, method: dict[str, Any], collect: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        train(static(tmp_path, name, method=method, collect=collect))


def test_a_torchvision_classifier_embeds_without_its_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    weights = models.get_model_weights("resnet18").DEFAULT
    torch.manual_seed(0)
    network = models.resnet18().eval()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / Path(weights.url).name)  # where a download would lie
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    embed = load_embedder("torchvision:resnet18").eval()
    images = torch.rand(2, 1, 40, 40)
    preset = weights.transforms()
    resized = nn.functional.interpolate(images.expand(-1, 3, -1, -1), 224, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    network.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(embed(images), network((resized - mean) / std))


def test_class_quotas_follow_the_recall_on_validation_data(tmp_path: Path) -> None:
    result = train(static(tmp_path, "entropy", method={"balance": "drop"}))
    recall = json.loads((result.folder / "collect" / "metrics.jsonl").read_text().splitlines()[-1])[
        "val_class_accuracy"
    ]
    labels = scores(result)["label"].to_numpy()
    sizes, counts = np.bincount(labels), np.bincount(labels[kept(result)], minlength=10)
    assert counts.sum() == 151
    shares = sizes * (1.0 - np.array(recall))
    order = np.argsort(shares / sizes)
    assert (counts / sizes)[order[-1]] > (counts / sizes)[order[0]]
    with pytest.raises(ValueError, match=r"balance 'drop' needs .* of a scoring run: leave out collect\.fresh"):
        train(static(tmp_path, "entropy", "fresh", method={"balance": "drop"}, collect={"fresh": False}))
