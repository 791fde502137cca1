"""gallery/: thumbnails and predictions of a few telling samples, written when a run has ended, for its report.

gallery.json    the samples of each kind, what they are and what the final network says of them
<id>.png        a thumbnail, where the inputs are images of one or three channels

Some samples of each kind pass through the final network once, in eval mode and on the CPU; no training sees them.
Shapes: B samples, C classes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rayprune.config import Config
from rayprune.engine.storage.checkpoint import load_tensors, newest_checkpoint
from rayprune.engine.storage.run_folder import RUN_SCHEMA, read_metrics
from rayprune.engine.train.build import InputSpec, build_network
from rayprune.errors import ConfigError
from rayprune.sources import SampleSource
from rayprune.sources.score_files import ScoreFile, read_scores

SAMPLES_OF_A_KIND = 6
# A wrong label shows as a high loss: the network is sure of another class, and hardly believes in the label.
_SUSPECTS, _SURE, _UNBELIEVED = 48, 0.8, 0.1
_DRAWN = 256  # samples whose loss is computed here, where the run has stored none
_LARGEST = 96  # pixels of a thumbnail
_BATCH = 64

logger = logging.getLogger(__name__)


def write_gallery(
    config: Config, source: SampleSource, spec: InputSpec, folder: Path, on_notice: Callable[[str], None]
) -> None:
    """Write gallery/ of a run that has ended and has its scores.parquet; what goes wrong is told and ends nothing.

    Args:
        config: of the run.
        source: its training samples.
        spec: what they look like.
        folder: of the run.
        on_notice: called with the reason where there is no gallery.
    """
    fresh = folder / "gallery.partial"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        _write(config, source, spec, folder, fresh)
        shutil.rmtree(folder / "gallery", ignore_errors=True)
        fresh.replace(folder / "gallery")
    except Exception as error:  # a picture for the report is not worth a run
        shutil.rmtree(fresh, ignore_errors=True)
        logger.debug("no gallery", exc_info=True)
        line = " ".join(str(error).split())[:200]
        on_notice(f"no gallery of notable samples ({type(error).__name__}: {line}); all else was written")


def _write(config: Config, source: SampleSource, spec: InputSpec, folder: Path, fresh: Path) -> None:
    scores = read_scores(folder)
    losses, by = _losses(scores)
    pruned = np.asarray(scores.scores.get("times_pruned", np.zeros(len(source))), dtype=np.float64)
    candidates = _order(losses, _SUSPECTS) if losses is not None else _drawn(len(source), config.train.seed)
    often = [sample for sample in _order(pruned) if pruned[sample] > 0]
    ends = [] if losses is None else [*_order(losses), *_order(-losses)]
    ids = np.unique(np.array([*candidates, *often, *ends], dtype=np.int64))
    probs_BC = _predictions(config, source, spec, folder, ids)
    said = {
        int(sample): _said(source, spec, int(sample), probs_C) for sample, probs_C in zip(ids, probs_BC, strict=True)
    }
    if losses is None:
        losses = np.full(len(source), np.nan)
        for sample, facts in said.items():
            losses[sample] = facts["loss_now"]
    kinds = {
        "hardest": _order(losses),
        "easiest": _order(-losses),
        "often_pruned": often,
        "probably_mislabelled": _mislabelled(said, candidates),
    }
    shown = sorted({sample for samples in kinds.values() for sample in samples})
    images = _thumbnails(source, spec, shown, fresh)
    listed = {
        kind: [
            {**said[sample], "loss": _or_none(losses[sample]), "times_pruned": int(pruned[sample])}
            | {"image": images.get(sample)}
            for sample in samples
        ]
        for kind, samples in kinds.items()
    }
    epochs = read_metrics(folder)[-1]["epoch"] + 1
    content = {"schema": RUN_SCHEMA, "by": by, "epochs": epochs, "kinds": listed}
    (fresh / "gallery.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _losses(scores: ScoreFile) -> tuple[NDArray[np.float64] | None, str]:
    """Return each sample's last loss, NaN where it has none, and how to call it; None where the run stored none."""
    if "loss" in scores.scores and np.isfinite(scores.scores["loss"]).any():
        return np.asarray(scores.scores["loss"], dtype=np.float64), "the loss at the last visit"
    return None, f"the final network's loss on {min(_DRAWN, scores.num_samples)} samples drawn at random"


def _drawn(num_samples: int, seed: int) -> list[int]:
    drawn = np.random.default_rng(seed).choice(num_samples, size=min(_DRAWN, num_samples), replace=False)
    return [int(sample) for sample in drawn]


def _order(values: NDArray[np.float64], most: int = SAMPLES_OF_A_KIND) -> list[int]:
    """Return the ids of the highest values; of equal ones the lower ids, and none that has no value."""
    order = np.argsort(-values, kind="stable")
    return [int(sample) for sample in order[np.isfinite(values[order])][:most]]


def _mislabelled(said: Mapping[int, Mapping[str, Any]], candidates: list[int]) -> list[int]:
    suspects = [
        sample
        for sample in candidates
        if said[sample]["prediction"] not in (None, said[sample]["label"])
        and said[sample]["probability"] >= _SURE
        and said[sample]["label_probability"] <= _UNBELIEVED
    ]
    return sorted(suspects, key=lambda sample: (-said[sample]["probability"], sample))[:SAMPLES_OF_A_KIND]


@torch.inference_mode()
def _predictions(
    config: Config, source: SampleSource, spec: InputSpec, folder: Path, ids: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return (B, C) the final network's probabilities; of several exits those of the last."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError("there is no sound checkpoint")
    device = torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, spec, device)
    network.load_state_dict(load_tensors(checkpoint / "model.pt", device))
    network.eval()
    parts = []
    for start in range(0, len(ids), _BATCH):
        rows = source.take(ids[start : start + _BATCH])[spec.column]
        output = network(spec.augment.evaluate(torch.from_numpy(np.require(rows, requirements=["C", "W"]))))
        logits_BC = output[-1] if isinstance(output, list | tuple) else output
        parts.append(logits_BC.double().softmax(dim=1))
    probs_BC: NDArray[np.float64] = torch.cat(parts).numpy()
    return probs_BC


def _said(source: SampleSource, spec: InputSpec, sample: int, probs_C: NDArray[np.float64]) -> dict[str, Any]:
    label, believed = int(source.labels[sample]), float(probs_C[source.labels[sample]])
    # A network that has diverged puts out NaN, of which argmax makes a class like any other.
    prediction = int(probs_C.argmax()) if np.isfinite(probs_C).all() else None
    names = source.schema.class_names
    return {
        "id": sample,
        "label": label,
        "label_name": names[label] if label < len(names) else None,
        "prediction": prediction,
        "prediction_name": names[prediction] if prediction is not None and prediction < len(names) else None,
        "probability": None if prediction is None else _or_none(float(probs_C[prediction])),
        "label_probability": _or_none(believed),
        "loss_now": _or_none(-float(np.log(max(believed, 1e-300)))),
    }


def _thumbnails(source: SampleSource, spec: InputSpec, ids: list[int], folder: Path) -> dict[int, str]:
    """Write a PNG file a sample, where samples are pictures; return their names."""
    column = source.schema.columns[spec.column]
    if column.dtype != "uint8" or len(column.shape) != 3 or column.shape[2] not in (1, 3) or not ids:
        return {}
    names = {}
    for sample, image_HWC in zip(ids, source.take(np.array(ids, dtype=np.int64))[spec.column], strict=True):
        picture = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
        picture.thumbnail((_LARGEST, _LARGEST))
        names[sample] = f"{sample}.png"
        picture.save(folder / names[sample], optimize=True)
    return names


def _or_none(value: float) -> float | None:
    # JSON has no NaN.
    return round(float(value), 6) if np.isfinite(value) else None
