"""How well an audit finds wrong labels: CIFAR-10 with the labels of single annotators, or with synthetic noise.

The first 10,000 training images; RAYPRUNE_CIFAR10 is the folder of their Parquet files, RAYPRUNE_CIFAR10N the archive
of human labels (CIFAR-10N, Wei et al., ICLR 2022, arXiv 2110.12088) with `random_label1` and `clean_label`. ResNet-8,
15 epochs, five folds. The rule `ensemble` was chosen by the synthetic noise alone:

    symmetric   18 % of the labels become another one, each with the same probability
    pairs       18 % become one that is alike: truck → car, bird → plane, deer → horse, cat ↔ dog
    instance    18 % become one that a linear model of the pixels confuses the image with, the less sure it is the more
                often

Synthetic noise is audited with three folds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figure
from rayprune.config.config import make_config
from rayprune.core.audit.suspects import RULES, Evidence, find_suspects
from rayprune.experiments.audit.runner import audit, evidence_of
from rayprune.sources import open_data

NUM_SAMPLES, NOISE_RATE, SEEDS = 10_000, 0.18, (0, 1, 2)
_PAIRS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
_TRAIN = {"epochs": 15, "batch_size": 64}
_OPTIM = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "warmup": 0.2}
_FOLDS, _SYNTHETIC_FOLDS = 5, 3


def figures() -> Iterator[Figure]:
    """Yield the figures for human labels."""
    data = images()
    with np.load(os.environ["RAYPRUNE_CIFAR10N"], allow_pickle=False) as labels:
        given, true = (labels[name][:NUM_SAMPLES].astype(np.int64) for name in ("random_label1", "clean_label"))
    yield from figures_of("labels of single annotators", data, given, true)


def synthetic() -> Iterator[Figure]:
    """Yield the figures for synthetic noise."""
    data = images()
    true = data["y_train"].astype(np.int64)
    for name, given in synthetic_labels(data["x_train"], true).items():
        yield from figures_of(f"{name} noise", data, given, true, folds=_SYNTHETIC_FOLDS)


def synthetic_labels(images: NDArray[np.uint8], true: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the labels with each kind of noise."""
    return {"symmetric": symmetric(true), "pairs": pairs(true), "instance": by_instance(images, true)}


def figures_of(
    name: str,
    data: Mapping[str, NDArray[Any]],
    given: NDArray[np.int64],
    true: NDArray[np.int64],
    folds: int = _FOLDS,
) -> Iterator[Figure]:
    """Yield the AUC of every rule and statistic, and the estimated noise rate, over audits with different seeds."""
    from sklearn.metrics import roc_auc_score

    wrong = given != true
    scores: dict[str, list[float]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            evidence, rate = run(Path(folder), {**data, "y_train": given}, seed, folds)
        for rule, values in rankings(evidence, seed).items():
            scores.setdefault(f"AUC by {rule}", []).append(float(roc_auc_score(wrong, values)))
        scores.setdefault("noise rate minus the true one, points", []).append(100.0 * (rate - wrong.mean()))
        accuracy = float((evidence.held_out.argmax(axis=1) == true).mean())
        scores.setdefault("out-of-fold accuracy on true labels", []).append(accuracy)
    for row, values in scores.items():
        yield Figure(f"{name}: {row}", values)


def run(folder: Path, arrays: Mapping[str, NDArray[Any]], seed: int, folds: int = _FOLDS) -> tuple[Evidence, float]:
    """Audit arrays; return the evidence and the estimated noise rate."""
    np.savez(folder / "data.npz", **arrays)
    config = make_config(
        {
            "data": {"source": "arrays", "path": str(folder / "data.npz"), "augment": {"crop": 0, "flip": True}},
            "model": {"name": "resnet8"},
            "train": {**_TRAIN, "seed": seed},
            "optim": _OPTIM,
            "scaling": {"num_workers": 0, "threads": 1},
            "run": {"storage_path": str(folder), "name": "audit"},
            "audit": {"folds": folds, "duplicates": False},
        }
    )
    result = audit(config)
    return evidence_of(config, np.asarray(arrays["y_train"])), float(result.summary["noise_rate"])


def rankings(evidence: Evidence, seed: int) -> dict[str, NDArray[Any]]:
    """Return what ranks the samples → (N,) numbers that are higher for labels that are more probably wrong."""
    found: dict[str, NDArray[Any]] = {}
    for rule in RULES:
        suspects = find_suspects(evidence, rule, seed)
        found[f"rule {rule}"] = suspects.p_wrong
    found |= {name: -values for name, values in suspects.statistics.items() if name not in ("loss", "correct")}
    found |= {"loss": suspects.statistics["loss"]}
    try:
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        return found
    for method in ("self_confidence", "normalized_margin"):
        quality = get_label_quality_scores(evidence.labels, evidence.held_out.astype(np.float64), method=method)
        found[f"cleanlab's {method}"] = -quality
    return found


def images() -> dict[str, NDArray[Any]]:
    """Return the images and true labels, decoded."""
    splits = open_data("parquet", path=os.environ["RAYPRUNE_CIFAR10"], cache="none")
    assert splits.validation is not None
    parts = {}
    for part, source, num in (
        ("train", splits.train, NUM_SAMPLES),
        ("test", splits.validation, len(splits.validation)),
    ):
        columns = source.take(np.arange(num))
        parts |= {f"x_{part}": columns[source.schema.input], f"y_{part}": columns["label"]}
    return parts


def symmetric(true: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return labels of which a share is another one at random."""
    rng = np.random.default_rng(1)
    wrong = rng.random(true.size) < NOISE_RATE
    return np.where(wrong, (true + rng.integers(1, 10, true.size)) % 10, true)


def pairs(true: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return labels of which a share is that of a class which is alike."""
    wrong = np.random.default_rng(1).random(true.size) < 2 * NOISE_RATE  # half of the classes have one
    return np.where(wrong, np.array([_PAIRS.get(label, label) for label in range(10)])[true], true)


def by_instance(images: NDArray[np.uint8], true: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return labels of which a share is a class that the image looks like to a linear model."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    num, rng = true.size, np.random.default_rng(1)
    pooled = images.reshape(num, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(num, -1)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    probs = cross_val_predict(model, pooled, true, cv=3, method="predict_proba")
    rows = np.arange(num)
    doubt = 1.0 - probs[rows, true]
    probs[rows, true] = 0.0
    others = np.cumsum(probs / probs.sum(axis=1, keepdims=True), axis=1)
    likely = (rng.random((num, 1)) < others).argmax(axis=1)
    return np.where(rng.random(num) < NOISE_RATE * doubt / doubt.mean(), likely, true)
