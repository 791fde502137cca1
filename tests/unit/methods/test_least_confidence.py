"""The least confident samples, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rayprune import LeastConfidence, Selector

CONFIDENCE = np.array([0.9, 0.3, 0.7, 0.3, 0.5], np.float32)


def scored(method: LeastConfidence, num_epochs: int, visits: int) -> Selector:
    """Return a Selector after some epochs, and a forward-only pass in the last of them that has seen CONFIDENCE."""
    selector = Selector(method, 5, num_epochs, seed=0)
    for epoch in range(visits):
        selection = selector.begin_epoch(epoch)
        selector.observe(np.arange(5), {"loss": np.ones(5)}, epoch)
        if selection.num_scored:
            selector.observe(np.arange(5), {"confidence": CONFIDENCE}, epoch, sweep=True)
    return selector


def test_the_lowest_confidences_after_the_scoring_epochs_are_kept() -> None:
    selector = scored(LeastConfidence(prune_ratio=0.6, score_epochs=2), 10, visits=2)
    assert selector.begin_epoch(2).ids.tolist() == [1, 3]
    assert selector.scores()["least_confidence"] == pytest.approx(1 - CONFIDENCE)
    # Later visits, of the kept samples only, do not change the subset.
    selector.observe(np.array([1, 3]), {"loss": np.array([0.9, 0.9], np.float32)}, 2)
    assert selector.begin_epoch(3).ids.tolist() == [1, 3]


def test_among_equal_confidences_the_lower_ids_are_kept() -> None:
    selector = scored(LeastConfidence(prune_ratio=0.8, score_epochs=1), 10, visits=1)
    assert selector.begin_epoch(1).ids.tolist() == [1]


def test_mistakes_are_one_line_with_the_cure() -> None:
    with pytest.raises(ValueError, match="one subset takes no schedule"):
        LeastConfidence(prune_ratio={"schedule": "linear"})
    with pytest.raises(ValueError, match="score_epochs 0 must be at least 1"):
        LeastConfidence(score_epochs=0)
    with pytest.raises(ValueError, match="score_epochs 3 needs at least 3 epochs, the run has 2: lower it"):
        scored(LeastConfidence(score_epochs=3), 2, visits=1).begin_epoch(1)
    with pytest.raises(ValueError, match=r"5 of 5 samples were not visited in epoch 1"):
        scored(LeastConfidence(score_epochs=2), 10, visits=1).begin_epoch(2)
