"""gallery/: thumbnails and predictions of a few notable samples, for the report of a finished run.

    gallery.json    the samples of each kind, with labels and the final network's predictions and losses
    <id>.png        a thumbnail, if the inputs are images of one or three channels

The samples pass once through the final network, in eval mode on the CPU.

Shapes: B samples, C classes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayprune.config import Config
from rayprune.engine.storage.run_folder import RUN_SCHEMA, read_metrics
from rayprune.engine.train.build import InputSpec
from rayprune.engine.train.predictions import final_predictions
from rayprune.errors import one_line
from rayprune.paths import replace_folder
from rayprune.sources import SampleSource
from rayprune.sources.tables.scores import ScoreFile, read_scores

SAMPLES_OF_A_KIND = 6
# A suspected label error has one of the highest losses, and the network is confident of another class.
_MIN_PROBABILITY, _MAX_LABEL_PROBABILITY = 0.8, 0.1
_NUM_CANDIDATES = 48  # samples with the highest losses, and with the lowest, that the final network visits
_NUM_RANDOM = 256  # samples whose loss is computed here if the run has stored none
_THUMBNAIL_PIXELS = 96

logger = logging.getLogger(__name__)


def write_gallery(
    config: Config, source: SampleSource, spec: InputSpec, folder: Path, on_notice: Callable[[str], None]
) -> None:
    """Write a finished run's gallery/; an error becomes a notice and does not end the run.

    Args:
        config: the run's config.
        source: its training samples.
        spec: the network's inputs.
        folder: the run's folder, with scores.parquet.
        on_notice: called with the reason if there is no gallery.
    """
    try:
        with replace_folder(folder / "gallery", last="gallery.json") as partial:
            _write(config, source, spec, folder, partial)
    except Exception as error:  # a picture for the report is not worth a run
        logger.debug("no gallery", exc_info=True)
        on_notice(
            f"no gallery of notable samples ({type(error).__name__}: {one_line(error)[:200]}); everything else was "
            "written"
        )


def _write(config: Config, source: SampleSource, spec: InputSpec, folder: Path, target: Path) -> None:
    scores = read_scores(folder)
    times_pruned = np.asarray(scores.scores.get("times_pruned", np.zeros(len(source))), dtype=np.float64)
    often_pruned = [sample for sample in _highest(times_pruned) if times_pruned[sample] > 0]
    hard, easy, ranking = _candidates(scores, config.train.seed)
    ids = np.unique(np.array([*hard, *easy, *often_pruned], dtype=np.int64))
    probs_BC = final_predictions(config, source, spec, folder, ids)
    entries = {int(sample): _entry(source, int(sample), probs_C) for sample, probs_C in zip(ids, probs_BC, strict=True)}
    kinds = {
        "hardest": _by_loss(entries, hard, highest=True),
        "easiest": _by_loss(entries, easy, highest=False),
        "often_pruned": often_pruned,
        "probably_mislabelled": _mislabeled(entries, hard),
    }
    images = write_thumbnails(source, sorted({sample for samples in kinds.values() for sample in samples}), target)
    for sample, entry in entries.items():
        entry["times_pruned"] = int(times_pruned[sample])
        entry["image"] = images.get(sample)
    content = {
        "schema": RUN_SCHEMA,
        "by": ranking,
        "epochs": read_metrics(folder)[-1]["epoch"] + 1,
        "kinds": {kind: [entries[sample] for sample in samples] for kind, samples in kinds.items()},
    }
    (target / "gallery.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _candidates(scores: ScoreFile, seed: int) -> tuple[list[int], list[int], str]:
    """Return the samples among which the hardest and the easiest are looked for, and how they are ranked, in words.

    The final network visits only these: a pass over all samples would take as long as a third of an epoch. The loss of
    a sample's last visit, perhaps many epochs ago, is good enough to find them, and only the final network's loss is
    of the same moment as its prediction.
    """
    losses = np.asarray(scores.scores.get("loss", ()), dtype=np.float64)
    if np.isfinite(losses).any():
        hard, easy = (_highest(sign * losses, _NUM_CANDIDATES) for sign in (1, -1))
        return hard, easy, f"that network's loss, among the {_NUM_CANDIDATES} highest and lowest at their last visit"
    sample = _random_ids(scores.num_samples, seed)
    return sample, sample, f"that network's loss, among {len(sample)} samples drawn at random"


def _by_loss(entries: Mapping[int, Mapping[str, Any]], samples: Sequence[int], *, highest: bool) -> list[int]:
    """Return the samples with the highest or lowest finite loss, lower ids first among equal ones."""
    sign = -1 if highest else 1
    known = [sample for sample in samples if entries[sample]["loss"] is not None]
    return sorted(known, key=lambda sample: (sign * entries[sample]["loss"], sample))[:SAMPLES_OF_A_KIND]


def _random_ids(num_samples: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).choice(num_samples, size=min(_NUM_RANDOM, num_samples), replace=False)
    return [int(sample) for sample in ids]


def _highest(values: NDArray[np.float64], count: int = SAMPLES_OF_A_KIND) -> list[int]:
    """Return the ids of the highest finite values, lower ids first among equal ones."""
    order = np.argsort(-values, kind="stable")
    return [int(sample) for sample in order[np.isfinite(values[order])][:count]]


def _mislabeled(entries: Mapping[int, Mapping[str, Any]], suspects: list[int]) -> list[int]:
    mislabeled = [
        sample
        for sample in suspects
        if entries[sample]["prediction"] not in (None, entries[sample]["label"])
        and entries[sample]["probability"] >= _MIN_PROBABILITY
        and entries[sample]["label_probability"] <= _MAX_LABEL_PROBABILITY
    ]
    return sorted(mislabeled, key=lambda sample: (-entries[sample]["probability"], sample))[:SAMPLES_OF_A_KIND]


def _entry(source: SampleSource, sample: int, probs_C: NDArray[np.float64]) -> dict[str, Any]:
    label, names = int(source.labels[sample]), source.schema.class_names
    label_probability = float(probs_C[label])
    # A network that has diverged returns NaN, and argmax would still name a class.
    prediction = int(probs_C.argmax()) if np.isfinite(probs_C).all() else None
    return {
        "id": sample,
        "label": label,
        "label_name": names[label] if label < len(names) else None,
        "prediction": prediction,
        "prediction_name": names[prediction] if prediction is not None and prediction < len(names) else None,
        "probability": None if prediction is None else _or_none(float(probs_C[prediction])),
        "label_probability": _or_none(label_probability),
        "loss": _or_none(-float(np.log(max(label_probability, 1e-300)))),
    }


def write_thumbnails(source: SampleSource, ids: list[int], folder: Path, prefix: str = "") -> dict[int, str]:
    """Write a PNG file per sample if the samples are images; return id → file name, which starts with the prefix."""
    name = source.schema.input
    column = source.schema.columns.get(name)
    if column is None or column.dtype != "uint8" or len(column.shape) != 3 or column.shape[2] not in (1, 3) or not ids:
        return {}
    names = {}
    for sample, image_HWC in zip(ids, source.take(np.array(ids, dtype=np.int64))[name], strict=True):
        picture = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
        picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        names[sample] = f"{prefix}{sample}.png"
        picture.save(folder / names[sample], optimize=True)
    return names


def _or_none(value: float) -> float | None:
    # JSON has no NaN.
    return round(float(value), 6) if np.isfinite(value) else None
