"""Scores from trajectories that another program logged, without training here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from rayprune.core.selector import Selector
from rayprune.methods import Method, build_method
from rayprune.sources.trajectories import read_trajectories

_LOGGED = ("probs", "loss")


def score_trajectories(
    method: Method | str | Mapping[str, Any],
    folder: str | Path,
    num_samples: int,
    seed: int = 0,
    labels: ArrayLike | None = None,
) -> Selector:
    """Feed a folder of logits to a method that scores whole trajectories, such as TDDS.

    Args:
        method: the method, its name or its config; its `collect_epochs` T are read.
        folder: as `rayprune.sources.trajectories` describes it.
        num_samples: N of the data set.
        seed: for what the method draws.
        labels: (N,) classes, where the method or its class floor needs them.

    Returns:
        The Selector in epoch T: `scores()` are the scores, `begin_epoch(T)` is the subset.

    Raises:
        ValueError: the method collects no epochs or needs other signals than logits and losses give, or the folder does
            not hold T whole epochs of N samples.
    """
    built = build_method(method)
    length = built.collect_epochs
    if not length or not set(built.signals) <= set(_LOGGED):
        cure = "choose one that scores probabilities over epochs, such as tdds"
        raise ValueError(f"method {built.name!r} cannot be scored from logged logits: {cure}")
    selector = Selector(built, num_samples, length + 1, seed, labels=labels)
    pieces = read_trajectories(folder, length, num_samples)
    for epoch, ids, probs_BC, losses in pieces:
        selector.begin_epoch(epoch)
        if losses is None and "loss" in built.signals:
            raise ValueError(f"method {built.name!r} needs losses: the folder {str(folder)!r} has no _Loss.npy")
        selector.observe(ids, {"probs": probs_BC} | ({} if losses is None else {"loss": losses}), epoch)
    selector.begin_epoch(length)
    return selector
