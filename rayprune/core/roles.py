"""Batches of the unpruned stream between those of a selection, for steps that learn from both.

A step that learns sample weights (Zhang et al., ECCV 2022, arXiv 2209.08310) judges them on rows that it does not train
on at that moment. Taken from a pruned selection these would be the hard samples only; so an epoch that prunes carries,
before every K-th global batch of its selection, one global batch of *meta* rows, drawn from all samples.

Shapes: N samples, P rows of a plan, S batches of a selection, GB rows of a global batch, K batches from meta to meta.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.windows import windowed

# What a row of a plan is for.
PADDING, TRAIN, META = range(3)


def num_meta_batches(num_batches: int, meta_every: int) -> int:
    """Return how many meta batches stand between the batches of a selection.

    >>> num_meta_batches(5, 2), num_meta_batches(4, 2), num_meta_batches(5, 0)
    (3, 2, 0)
    """
    return -(-num_batches // meta_every) if meta_every else 0


def is_meta(step: int, meta_every: int) -> bool:
    """Tell whether a step of a plan is a meta batch.

    >>> [is_meta(step, 2) for step in range(6)]
    [True, False, False, True, False, False]
    """
    return meta_every > 0 and step % (meta_every + 1) == 0


def train_step_of(step: int, meta_every: int) -> int:
    """Return how many of a plan's steps before this one train.

    >>> [train_step_of(step, 2) for step in range(6)]
    [0, 0, 1, 2, 2, 3]
    """
    return step - num_meta_batches(step, meta_every + 1) if meta_every else step


def row_roles(rows: NDArray[np.int64], batch_size: int, num_rows: int, meta_every: int) -> NDArray[np.int8]:
    """Return PADDING, TRAIN or META of rows of a plan.

    Args:
        rows: their positions in it.
        batch_size: GB.
        num_rows: rows of the selection; the padding of its last batch comes behind them.
        meta_every: K, 0 for none.
    """
    if not meta_every:
        return np.where(rows < num_rows, np.int8(TRAIN), np.int8(PADDING))
    steps = rows // batch_size
    before = -(-steps // (meta_every + 1))  # meta batches before each row's step
    real = rows - before * batch_size < num_rows
    return np.where(steps % (meta_every + 1) == 0, META, np.where(real, TRAIN, PADDING)).astype(np.int8)


def with_meta(order: NDArray[Any], meta: NDArray[np.int64], batch_size: int, meta_every: int) -> NDArray[Any]:
    """Put meta batches before every K-th batch of an order.

    Args:
        order: (S·GB,) the selection, its padding included.
        meta: rows of `num_meta_batches(S, K)` global batches.
        batch_size, meta_every: GB and K, K at least 1.

    Returns:
        (P,) of the order's dtype.
    """
    num_steps = order.size // batch_size + meta.size // batch_size
    laid = np.empty((num_steps, batch_size), dtype=order.dtype)
    metas = np.arange(num_steps) % (meta_every + 1) == 0
    laid[metas], laid[~metas] = meta.reshape(-1, batch_size), order.reshape(-1, batch_size)
    return laid.ravel()


def meta_rows(
    count: int,
    num_samples: int,
    batch_size: int,
    rng: np.random.Generator,
    groups: NDArray[np.int64] | None,
    window_rows: int,
) -> NDArray[np.int64]:
    """Draw rows of all samples, each one once before any comes again, in windows of groups where there are some.

    Args:
        count: of rows.
        num_samples: N.
        batch_size: GB.
        rng: the epoch's generator of meta rows.
        groups, window_rows: as for `Plan.of_selection`.

    Returns:
        (count,) ids.
    """
    passes = []
    for _ in range(-(-count // num_samples)):
        order = np.arange(num_samples, dtype=np.int64)
        if groups is None:
            rng.shuffle(order)
        else:
            windowed(order, groups, batch_size, window_rows, rng)
        passes.append(order)
    return np.concatenate([*passes, np.empty(0, dtype=np.int64)])[:count]
