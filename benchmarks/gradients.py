"""Seconds and peak memory of choosing half of the samples by last-layer gradients: CRAIG, GradMatch and GLISTER.

The peak includes the mapped file of the vectors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from benchmarks.harness import Figure, peak_bytes, seconds
from rayprune import Selector, build_method

NUM_SAMPLES, NUM_CLASSES, NUM_INPUTS = 100_000, 10, 64
CASES: tuple[dict[str, Any], ...] = (
    {"name": "craig"},
    {"name": "craig", "balance": "none"},
    {"name": "craig", "gradient": "last_layer"},
    {"name": "gradmatch"},
    {"name": "gradmatch", "gradient": "last_layer"},
    {"name": "glister"},
    {"name": "glister", "balance": "none"},
    {"name": "glister", "gradient": "last_layer"},
)
_CHUNK = 1 << 13


def figures() -> Iterator[Figure]:
    """Yield the figures of each method."""
    return figures_of(CASES, NUM_SAMPLES, NUM_CLASSES)


def figures_of(cases: Iterable[dict[str, Any]], num_samples: int, num_classes: int) -> Iterator[Figure]:
    """Yield the figures of method configs; each runs in its own process, for the sake of its memory peak."""
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.gradients", json.dumps(case), str(num_samples), str(num_classes)]
        values = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        options = "".join(f", {key} {value}" for key, value in case.items() if key != "name")
        inputs = f" + {NUM_INPUTS} inputs" if case.get("gradient") == "last_layer" else ""
        label = f"{case['name']}{options}, {num_samples:,} × {num_classes}{inputs}"
        yield Figure(f"{label}, s", [values["seconds"]])
        yield Figure(f"{label}, peak MiB", [values["MiB"]])


def _measure(config: dict[str, Any], num_samples: int, num_classes: int) -> dict[str, float]:
    labels = np.random.default_rng(0).integers(0, num_classes, num_samples)
    selector = Selector(build_method({"score_epochs": 1, **config}), num_samples, 2, labels=labels)
    selector.begin_epoch(0)
    ids = np.arange(num_samples)
    selector.observe(ids, {"loss": np.ones(num_samples)}, 0)
    before = peak_bytes()
    classes = np.random.default_rng(1).normal(size=(num_classes, NUM_INPUTS)).astype(np.float32)
    for start in range(0, num_samples, _CHUNK):
        part = ids[start : start + _CHUNK]
        selector.observe(part, _signals(labels[part], classes, start), 0, sweep=True)
    taken = seconds(selector.end_sweep)
    return {"seconds": taken, "MiB": (peak_bytes() - before) / 2**20}


def _signals(labels: Any, classes: Any, seed: int) -> dict[str, Any]:
    """Return the signals of a linear layer on inputs that scatter around their class."""
    rng = np.random.default_rng(seed)
    inputs = np.maximum(classes[labels] + 1.5 * rng.normal(size=(labels.size, NUM_INPUTS)).astype(np.float32), 0.0)
    logits = inputs @ classes.T * (4.0 / NUM_INPUTS**0.5)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    probs[np.arange(labels.size), labels] -= 1.0
    return {"logit_gradient": probs, "embedding": inputs}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
