"""Rewards become groups: all rollouts of one draw of a prompt, whatever the calls they arrive in.

Shapes: B rows of a call, G rollouts of a draw, K complete groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.validation import short_repr
from rayprune.errors import ConfigError

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RewardGroups:
    """Complete groups, in the order in which they were completed.

    Attributes:
        ids: (K,) int64, the prompts; an id may repeat.
        sizes: (K,) int64, rollouts of each group, at least 1.
        sums: (K,) float64, the sum of the rewards.
        successes: (K,) float64, the sum of the success values, each in [0, 1].
        constant: (K,) bool, whether all rewards of a group of at least two are equal ("zero variance").
    """

    ids: Ids
    sizes: NDArray[np.int64]
    sums: NDArray[np.float64]
    successes: NDArray[np.float64]
    constant: NDArray[np.bool_]

    def __len__(self) -> int:
        return self.ids.size

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> RewardGroups:
        return RewardGroups(
            self.ids[rows], self.sizes[rows], self.sums[rows], self.successes[rows], self.constant[rows]
        )

    @property
    def easy(self) -> NDArray[np.bool_]:
        """(K,) bool, the constant groups whose mean success is at least one half."""
        return self.constant & (2 * self.successes >= self.sizes)

    def rounds(self) -> Iterator[RewardGroups]:
        """Yield the groups in parts with distinct ids; the groups of one prompt keep their order."""
        if len(self) == np.unique(self.ids).size:
            yield self
            return
        order = np.argsort(self.ids, kind="stable")
        starts = np.flatnonzero(np.diff(self.ids[order], prepend=-1))
        lengths = np.diff(starts, append=len(self))
        rank = np.empty(len(self), dtype=np.int64)
        rank[order] = np.arange(len(self)) - np.repeat(starts, lengths)
        for number in range(int(lengths.max())):
            yield self[rank == number]


@dataclass(frozen=True)
class RewardScale:
    """What a reward says about success.

    Args:
        success: a reward of at least this is a success (1), a lower one a failure (0); None for rates.
        reward_range: (low, high), the rewards that become success 0 and 1 where `success` is None.
        tolerance: rewards of a group that differ by at most this are equal.

    Raises:
        ConfigError: a value that cannot work.
    """

    success: float | None = None
    reward_range: tuple[float, float] = (0.0, 1.0)
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.success is not None and not _is_number(self.success):
            raise ConfigError(f"success {short_repr(self.success)} must be a finite number or None")
        bounds = self.reward_range
        is_pair = isinstance(bounds, tuple | list) and len(bounds) == 2 and all(map(_is_number, bounds))
        if not is_pair or not bounds[0] < bounds[1]:
            raise ConfigError(f"reward_range {short_repr(self.reward_range)} must be (low, high) with low < high")
        if not _is_number(self.tolerance) or self.tolerance < 0:
            raise ConfigError(f"tolerance {short_repr(self.tolerance)} must be a number of at least 0")

    def check(self, rewards: NDArray[np.float64]) -> None:
        """Refuse rewards outside the range.

        Raises:
            ConfigError: a reward outside `reward_range`, where `success` is None.
        """
        low, high = self.reward_range
        outside = rewards[(rewards < low - self.tolerance) | (rewards > high + self.tolerance)]
        if self.success is None and outside.size:
            raise ConfigError(
                f"reward {outside[0]:g} is outside [{low:g}, {high:g}]: give reward_range=(low, high), or success= "
                "with the least reward of a success"
            )

    def successes(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the success values in [0, 1] of rewards of any shape."""
        if self.success is not None:
            return (rewards >= self.success).astype(np.float64)
        low, high = self.reward_range
        return np.clip((rewards - low) / (high - low), 0.0, 1.0)

    def groups(self, ids: Ids, group: NDArray[np.int64], rewards: NDArray[np.float64]) -> RewardGroups:
        """Return the groups of rewards that belong together.

        The result does not depend on the order of the rewards within a group, to the last bit.

        Args:
            ids: (K,) int64, the prompt of each group.
            group: (R,) int64 in [0, K), the group of each reward; every group occurs.
            rewards: (R,) float64.
        """
        if not ids.size:
            nothing = np.zeros(0)
            return RewardGroups(ids, nothing.astype(np.int64), nothing, nothing, nothing.astype(bool))
        order = np.lexsort((rewards, group))
        ordered = rewards[order]
        sizes = np.bincount(group, minlength=ids.size)
        starts = np.cumsum(sizes) - sizes
        spread = ordered[starts + sizes - 1] - ordered[starts]
        sums = np.add.reduceat(ordered, starts)
        successes = np.add.reduceat(self.successes(ordered), starts)
        return RewardGroups(ids, sizes, sums, successes, (spread <= self.tolerance) & (sizes > 1))


def check_rewards(ids: ArrayLike, rewards: ArrayLike, num_prompts: int) -> tuple[Ids, NDArray[np.float64]]:
    """Return ids (B,) int64 and rewards (B,) or (B, G) float64, checked.

    Raises:
        ConfigError: ids that are no integers in [0, num_prompts), rewards of another shape, or not finite.
    """
    keys, values = _array("ids", ids), _array("rewards", rewards)
    if keys.ndim != 1 or (keys.dtype.kind not in "iu" and keys.size):
        raise ConfigError(f"ids must be integers of shape (B,), got {keys.dtype} of shape {keys.shape}")
    if values.dtype.kind not in "biuf" and values.size:
        raise ConfigError(f"rewards must be numbers, got {values.dtype}: give floats, one per rollout")
    if values.ndim not in (1, 2) or values.shape[0] != keys.size or 0 in values.shape[1:]:
        raise ConfigError(
            f"rewards of shape {values.shape} do not fit {keys.size} ids: give (B,), one reward for each id, or (B, G)"
        )
    if keys.size and not (keys.min() >= 0 and keys.max() < num_prompts):
        unknown = keys[(keys < 0) | (keys >= num_prompts)][0]
        raise ConfigError(f"unknown id {unknown}: ids are positions in [0, {num_prompts})")
    values = values.astype(np.float64)
    finite = np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(axis=1)
    if not finite.all():
        raise ConfigError(
            f"the reward of id {keys[~finite][0]} is NaN or infinite: give a failed rollout the reward of a failure, "
            "or leave it out"
        )
    return keys.astype(np.int64), values


def _array(name: str, values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):  # a tensor: of any device, with gradients, in bfloat16, which NumPy does not have
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        return np.asarray(values)
    except ValueError:  # rows of several lengths
        raise ConfigError(
            f"{name} must be an array, got rows of several lengths: give one reward for each id"
        ) from None


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return is_number and bool(np.isfinite(value))


class GroupBuffer:
    """Holds the rewards of incomplete groups.

    Args:
        group_size: G; None if each call has whole groups.
        scale: how rewards are read.
    """

    def __init__(self, group_size: int | None, scale: RewardScale) -> None:
        self.group_size, self.scale = group_size, scale
        self._pending: dict[int, list[float]] = {}

    @property
    def num_pending(self) -> int:
        """The number of rewards in incomplete groups."""
        return sum(map(len, self._pending.values()))

    def add(self, ids: Ids, rewards: NDArray[np.float64]) -> RewardGroups:
        """Add checked rewards, (B,) or (B, G); return the groups that are complete now."""
        whole = rewards.ndim == 2 and self.group_size in (None, rewards.shape[1])
        if whole:
            return self.scale.groups(ids, np.repeat(np.arange(ids.size), rewards.shape[1]), rewards.ravel())
        flat = np.repeat(ids, rewards.shape[1]) if rewards.ndim == 2 else ids
        if self.group_size is not None:
            return self._complete(flat, rewards.ravel(), self.group_size)
        distinct, first, group = np.unique(flat, return_index=True, return_inverse=True)
        order = np.argsort(first)  # groups in the order of their first reward
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        return self.scale.groups(distinct[order], rank[group], rewards.ravel())

    def _complete(self, ids: Ids, rewards: NDArray[np.float64], size: int) -> RewardGroups:
        done: list[int] = []
        values: list[float] = []
        for prompt, reward in zip(ids.tolist(), rewards.tolist(), strict=True):
            waiting = self._pending.setdefault(prompt, [])
            waiting.append(reward)
            if len(waiting) == size:
                done.append(prompt)
                values += self._pending.pop(prompt)
        group = np.repeat(np.arange(len(done)), size)
        return self.scale.groups(np.array(done, dtype=np.int64), group, np.array(values))

    def to_arrays(self) -> dict[str, NDArray[np.float64] | Ids]:
        """Return the incomplete groups: `ids` and `rewards`, (R,) each, ordered by id and reward."""
        pairs = [(prompt, reward) for prompt in sorted(self._pending) for reward in sorted(self._pending[prompt])]
        return {
            "ids": np.array([prompt for prompt, _ in pairs], dtype=np.int64),
            "rewards": np.array([reward for _, reward in pairs], dtype=np.float64),
        }

    def load_arrays(self, ids: Ids, rewards: NDArray[np.float64]) -> None:
        """Restore what `to_arrays` returned."""
        self._pending = {}
        for prompt, reward in zip(ids.tolist(), rewards.tolist(), strict=True):
            self._pending.setdefault(prompt, []).append(reward)
