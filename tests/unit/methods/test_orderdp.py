"""OrderDP: inclusion probabilities against the closed form."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
import pytest

from rayprune.core import Selector
from rayprune.methods import build_method
from rayprune.testing import check_method

NUM_SEEDS = 4000


def closed_form(n: int, s: int, q: int) -> np.ndarray:
    """Return the probability that the j-th largest loss is kept, j = 1..n."""
    return np.array(
        [sum(comb(j - 1, k - 1) * comb(n - j, s - k) for k in range(1, q + 1)) / comb(n, s) for j in range(1, n + 1)]
    )


def kept_shares(losses: np.ndarray, **options: Any) -> np.ndarray:
    times = np.zeros(losses.size)
    for seed in range(NUM_SEEDS):
        selector = Selector(build_method({"name": "orderdp", **options}), losses.size, 5, seed)
        selector.observe(np.arange(losses.size), {"loss": losses}, 0)
        times += selector.begin_epoch(1).codes
    return times / NUM_SEEDS


def test_the_closed_form_of_the_small_example() -> None:
    np.testing.assert_allclose(closed_form(6, 4, 2), [2 / 3, 2 / 3, 7 / 15, 1 / 5, 0, 0])


@pytest.mark.parametrize(
    ("n", "s", "q", "options"),
    [
        (6, 4, 2, {"prune_ratio": 4 / 6, "pool": 4 / 6}),
        (9, 3, 3, {"prune_ratio": 6 / 9, "pool": 3 / 9}),  # a uniform draw
        (9, 9, 2, {"prune_ratio": 7 / 9, "pool": 1.0}),  # the highest losses
        (16, 8, 4, {}),  # the defaults: half of the samples, and half of those
    ],
)
def test_inclusion_probabilities_are_the_closed_form(n: int, s: int, q: int, options: dict[str, Any]) -> None:
    losses = np.random.default_rng(0).permutation(n).astype(np.float32)
    expected = closed_form(n, s, q)[np.argsort(np.argsort(-losses))]
    assert expected.sum() == pytest.approx(q)
    shares = kept_shares(losses, **options)
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / NUM_SEEDS) + 1e-9).all()


def test_the_pool_follows_the_ratio() -> None:
    # r = 0.36: a pool of 0.8·N, and 0.8 of it. The 20 lowest losses are never kept, as the pool has 80 of 100.
    shares = kept_shares(np.arange(100.0), prune_ratio=0.36)
    assert shares.sum() == pytest.approx(64)
    expected = closed_form(100, 80, 64)[::-1]
    assert np.abs(shares - expected).max() < 5 * np.sqrt(0.25 / NUM_SEEDS)


def test_a_pool_smaller_than_the_kept_number_is_refused() -> None:
    selector = Selector(build_method({"name": "orderdp", "prune_ratio": 0.2, "pool": 0.5}), 10, 5)
    selector.observe(np.arange(10), {"loss": np.arange(10.0)}, 0)
    with pytest.raises(ValueError, match=r"a pool of 5 samples cannot give the 8 that prune_ratio keeps: raise pool"):
        selector.begin_epoch(1)


@pytest.mark.parametrize("pool", [0.0, 1.1, -1])
def test_mistakes(pool: float) -> None:
    with pytest.raises(ValueError, match=r"pool .* is outside \(0, 1\]"):
        build_method({"name": "orderdp", "pool": pool})


def test_a_pool_of_its_own_conforms() -> None:
    check_method({"name": "orderdp", "prune_ratio": 0.5, "pool": 1.0})
