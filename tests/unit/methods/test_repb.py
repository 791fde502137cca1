"""RePB: candidates of the newest epoch, weights by inclusion, and both ways to rescale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.testing import check_method


def selector_of(num_samples: int, seed: int = 0, num_epochs: int = 40, **options: Any) -> Selector:
    return Selector(build_method({"name": "repb", **options}), num_samples, num_epochs, seed)


def candidates(selector_losses: list[tuple[list[int], list[float]]], epoch: int, num_samples: int) -> set[int]:
    """Return the samples that an epoch sometimes drops."""
    dropped: set[int] = set()
    for seed in range(60):
        selector = selector_of(num_samples, seed)
        for visit, (ids, losses) in enumerate(selector_losses):
            selector.observe(ids, {"loss": losses}, visit)
        dropped |= set(np.flatnonzero(selector.begin_epoch(epoch).codes == 0).tolist())
    return dropped


def test_losses_are_compared_within_their_epoch_only() -> None:
    assert candidates([([0, 1, 2, 3], [1.0, 2.0, 9.0, 10.0])], 1, 4) == {0, 1}
    newest = ([1, 2, 3], [0.5, 0.9, 2.0])  # their mean is 1.13
    # Sample 0 was dropped in epoch 1: a candidate, though its old loss is above the mean of the newest ones.
    assert candidates([([0, 1, 2, 3], [4.0, 2.0, 9.0, 10.0]), newest], 2, 4) == {0, 1, 2}
    # The mean of all last losses is 0.875, below the 0.9 of sample 2.
    assert candidates([([0, 1, 2, 3], [0.1, 2.0, 9.0, 10.0]), newest], 2, 4) == {0, 1, 2}


def test_equal_losses_drop_nothing() -> None:
    assert candidates([([0, 1, 2], [0.1, 0.1, 0.1])], 1, 3) == set()


def test_kept_numbers_and_weights_follow_the_inclusions() -> None:
    num, epochs = 200, 30
    selector = selector_of(num, num_epochs=epochs, prune_ratio=0.4, anneal_start=1.0)
    losses, included = np.arange(num, dtype=float), np.zeros(num)
    for epoch in range(epochs):
        selection = selector.begin_epoch(epoch)
        included[selection.ids] += 1
        if epoch:
            np.testing.assert_allclose(selection.weights, (epoch + 1) / included[selection.ids], rtol=1e-6)
            assert selection.requested == pytest.approx(0.4)
            assert abs(num - selection.num_kept - selection.expected_drops) < 1
        selector.observe(selection.ids, {"loss": losses[selection.ids]}, epoch)
    assert included[-50:].min() == epochs
    # Consistent: in the end the weights of the candidates are near 1/(1 − ρ), and their sum is near N.
    assert selection.weights[selection.weights > 1].mean() == pytest.approx(1 / 0.6, rel=0.1)
    assert selection.weights.sum() == pytest.approx(num, rel=0.05)


def test_cumulative_weights_are_biased_at_first_and_inverse_ones_never() -> None:
    sums: dict[str, list[float]] = {"cumulative": [], "inverse": []}
    for rescale, totals in sums.items():
        for seed in range(200):
            selector = selector_of(20, seed, rescale=rescale)
            selector.begin_epoch(0)
            selector.observe(np.arange(20), {"loss": np.arange(20.0)}, 0)
            selection = selector.begin_epoch(1)
            totals.append(float(selection.weights.sum()))
    assert np.mean(sums["cumulative"]) == pytest.approx(15)  # candidates that were in all epochs weigh 1
    assert np.mean(sums["inverse"]) == pytest.approx(20)


def test_the_declaration_of_unbiasedness_follows_the_option() -> None:
    inverse = build_method({"name": "repb", "rescale": "inverse"})
    assert inverse.unbiased
    assert not build_method("repb").unbiased
    check_method(inverse)
    check_method({"name": "shuffled", "of": {"name": "repb", "rescale": "inverse"}})


def test_a_ratio_of_zero_keeps_all_and_still_rescales() -> None:
    selector = selector_of(4, prune_ratio={"schedule": "step", "milestones": [0.05], "ratios": [0.0], "start": 0.5})
    selector.begin_epoch(0)
    selector.observe(range(4), {"loss": [1.0, 2.0, 3.0, 4.0]}, 0)
    dropped = np.flatnonzero(selector.begin_epoch(1).codes == 0)
    assert dropped.size == 1
    selector.observe(np.setdiff1d(range(4), dropped), {"loss": [1.0, 2.0, 3.0]}, 1)
    selection = selector.begin_epoch(2)
    assert selection.num_kept == 4
    assert selection.weights[dropped[0]] == pytest.approx(3 / 2)
    assert selection.expected_drops == 0


@pytest.mark.parametrize(
    ("options", "message"), [({"rescale": "inverted"}, "did you mean 'inverse'"), ({"prune_ratio": -1}, "outside")]
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method({"name": "repb", **options})


def test_a_ratio_too_close_to_one_is_refused() -> None:
    selector = selector_of(4, prune_ratio=0.9999999)
    selector.observe(range(4), {"loss": [1.0, 2.0, 3.0, 4.0]}, 0)
    with pytest.raises(ValueError, match="leaves weights of 1e"):
        selector.begin_epoch(1)
