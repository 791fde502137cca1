"""The Pareto front of runs: those that no other run beats in accuracy without costing more."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(gains: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Tell which points are on the front: no other gains as much at no more cost, and more of one or less of the other.

    Args:
        gains: to be large, such as accuracies; a point with NaN is never on the front.
        costs: to be small, such as compute; as many.

    >>> pareto_front([0.9, 0.8, 0.85], [3.0, 1.0, 3.0])
    [True, True, False]
    """
    order = sorted(
        (i for i, (gain, cost) in enumerate(zip(gains, costs, strict=True)) if gain == gain and cost == cost),
        key=lambda i: (costs[i], -gains[i]),
    )
    front = [False] * len(gains)
    best: tuple[float, float] | None = None  # gain and cost of the front's last point
    for i in order:
        if best is None or gains[i] > best[0]:
            best = (gains[i], costs[i])
        # An equal twin is beaten by nothing either.
        front[i] = best == (gains[i], costs[i])
    return front
