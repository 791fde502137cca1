"""gallery/: its samples, their predictions and thumbnails; its errors never fail a run."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from rayprune.engine.train import gallery
from rayprune.engine.train.driver import open_splits, train
from rayprune.experiments.early_exit.evaluate import find_device, open_run
from rayprune.report.collect import collect
from rayprune.report.page import render
from tests.support.runs import run_config, same_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = {"name": "infobatch", "prune_ratio": 0.6}
    return train(run_config(tmp_path_factory.mktemp("runs"), method=method, train={"epochs": 5})).folder


def kinds_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((folder / "gallery" / "gallery.json").read_text())["kinds"]
    return found


def test_the_gallery_has_the_hardest_and_the_easiest_samples(run: Path) -> None:
    scores, kinds = pd.read_parquet(run / "scores.parquet"), kinds_of(run)
    often = scores.sort_values("times_pruned", ascending=False, kind="stable")["id"].head(gallery.SAMPLES_OF_A_KIND)
    assert [sample["id"] for sample in kinds["often_pruned"]] == often.tolist()
    for kind, ascending in (("hardest", False), ("easiest", True)):
        candidates = scores.sort_values("loss", ascending=ascending, kind="stable")["id"].head(48).tolist()
        losses = [sample["loss"] for sample in kinds[kind]]
        assert len(losses) == gallery.SAMPLES_OF_A_KIND
        assert losses == sorted(losses, reverse=not ascending)
        assert {sample["id"] for sample in kinds[kind]} <= set(candidates)
    for sample in kinds["probably_mislabelled"]:
        assert sample["prediction"] != sample["label"]
        assert sample["probability"] >= 0.8
        assert sample["label_probability"] <= 0.1


def test_the_hardest_are_those_of_the_final_network(run: Path) -> None:
    opened = open_run(run, find_device("cpu"))
    source = open_splits(opened.config).train
    scores = pd.read_parquet(run / "scores.parquet")
    candidates = np.array(scores.sort_values("loss", ascending=False, kind="stable")["id"].head(48))
    rows = source.take(candidates)
    inputs = opened.input.augment.evaluate(torch.from_numpy(rows[opened.input.column].copy()))
    with torch.no_grad():
        losses = cross_entropy(opened.network(inputs).double(), torch.from_numpy(rows["label"]), reduction="none")
    expected = candidates[np.argsort(-losses.numpy(), kind="stable")][: gallery.SAMPLES_OF_A_KIND]
    assert [sample["id"] for sample in kinds_of(run)["hardest"]] == expected.tolist()


def test_predictions_are_those_of_the_final_network(run: Path) -> None:
    opened = open_run(run, find_device("cpu"))
    source = open_splits(opened.config).train
    for sample in kinds_of(run)["hardest"]:
        rows = source.take(np.array([sample["id"]]))
        inputs = opened.input.augment.evaluate(torch.from_numpy(rows[opened.input.column].copy()))
        with torch.no_grad():
            probs = opened.network(inputs).double().softmax(1)[0]
        assert sample["label"] == rows["label"][0]
        assert sample["prediction"] == int(probs.argmax())
        assert sample["probability"] == pytest.approx(float(probs.max()), abs=1e-5)
        assert sample["loss"] == pytest.approx(-float(probs[sample["label"]].log()), abs=1e-4)
        assert sample["label_probability"] == pytest.approx(float(probs[sample["label"]]), abs=1e-5)


def test_thumbnails_show_the_samples(run: Path) -> None:
    source = open_splits(open_run(run, find_device("cpu")).config).train
    shown = [sample for samples in kinds_of(run).values() for sample in samples]
    assert {file.name for file in (run / "gallery").iterdir()} == {"gallery.json"} | {s["image"] for s in shown}
    for sample in shown:
        pixels = np.asarray(Image.open(run / "gallery" / sample["image"]))
        assert np.array_equal(pixels, source.take(np.array([sample["id"]]))["image"][0, :, :, 0])


def test_a_wrong_label_is_suspected(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = (np.eye(3)[labels] * 6 + rng.normal(size=(300, 3)) * 0.3).astype(np.float32)
    labels[[7, 90]] = (labels[[7, 90]] + 1) % 3
    np.savez(tmp_path / "data.npz", x=features, y=labels)
    data = {"source": "arrays", "path": str(tmp_path / "data.npz"), "limit": None}
    result = train(run_config(tmp_path, data=data, method={"name": "full"}, train={"epochs": 6}))
    suspects = kinds_of(result.folder)["probably_mislabelled"]
    # Ids are those of the training part: the two are known by what the network is sure of.
    assert 1 <= len(suspects) <= 2
    assert all((sample["prediction"] + 1) % 3 == sample["label"] for sample in suspects)
    assert all(sample["image"] is None for sample in suspects)  # features are no pictures


def test_a_failing_gallery_does_not_fail_the_run(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no space\nleft")

    monkeypatch.setattr(gallery, "write_thumbnails", broken)
    notices: list[str] = []
    method = {"name": "infobatch", "prune_ratio": 0.6}
    result = train(run_config(tmp_path, method=method, train={"epochs": 5}), on_notice=notices.append)
    assert any("no gallery" in line and "no space left" in line for line in notices)
    assert not list(result.folder.glob("gallery*"))
    assert same_weights(result.folder, run)
    assert "no gallery of notable samples" in render(collect([result.folder]))


def test_the_report_escapes_names_and_embeds_thumbnails(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    file = folder / "gallery" / "gallery.json"
    content = json.loads(file.read_text())
    first = content["kinds"]["hardest"][0]
    first["label_name"], first["image"] = "<script>1</script>", "../../secret.png"
    (tmp_path / "secret.png").write_bytes((folder / "gallery" / content["kinds"]["hardest"][1]["image"]).read_bytes())
    file.write_text(json.dumps(content))
    text = render(collect([folder]))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    picture = (folder / "gallery" / content["kinds"]["easiest"][0]["image"]).read_bytes()
    assert base64.b64encode(picture).decode() in text
    listed = sum(len(samples) for samples in content["kinds"].values())
    assert text.count("<img ") == listed - 1


@pytest.mark.parametrize("content", ['{"schema": 1}', '{"schema": 1, "kinds": []}'])
def test_a_damaged_gallery_is_one_line(run: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    (folder / "gallery" / "gallery.json").write_text(content)
    with pytest.raises(ValueError, match="delete its folder"):
        render(collect([folder]))
    (folder / "gallery" / "gallery.json").write_text('{"schema": 7}')
    with pytest.raises(ValueError, match="upgrade rayprune"):
        collect([folder])


def test_a_network_of_nan_has_no_predictions_and_no_suspects(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    opened = open_run(folder, find_device("cpu"))
    source = open_splits(opened.config).train
    monkeypatch.setattr(gallery, "final_predictions", lambda *given: np.full((len(given[-1]), 10), np.nan))
    notices: list[str] = []
    gallery.write_gallery(opened.config, source, opened.input, folder, notices.append)
    assert notices == []
    kinds = kinds_of(folder)
    assert [kinds[kind] for kind in ("probably_mislabelled", "hardest", "easiest")] == [[], [], []]
    assert [sample["prediction"] for sample in kinds["often_pruned"]] == [None] * gallery.SAMPLES_OF_A_KIND
    text = render(collect([folder]))
    assert "→ None" not in text
    assert "confidence –" in text
