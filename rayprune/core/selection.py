"""One epoch's selection: which samples are kept, with which weights, and which are only scored.

A Selection stores one code per sample (1 byte for up to 255 distinct weights) instead of ids and weights, so that a
billion rows fit in memory; ids and weights are computed on access. Sample ids are int64 in [0, N) and never pass
through a floating-point type.

Shapes: N samples, M kept, V distinct weights, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.table import Ids, chunks
from rayprune.errors import ConfigError, RunFolderError

_NO_IDS: Ids = np.empty(0, dtype=np.int64)
# Class counts take an array as long as the largest label. Labels above both limits are probably ids.
_MAX_CLASSES, _MAX_CLASSES_PER_SAMPLE = 1 << 20, 10


@dataclass(frozen=True, eq=False)
class Selection:
    """Hold the kept samples of one epoch and their weights; immutable.

    Attributes:
        codes: (N,) unsigned integers; 0 = pruned, c > 0 = kept with weight `weight_values[c - 1]`.
        weight_values: (V,) float32, the distinct weights.
        requested: the prune ratio that the method requested for this epoch, in [0, 1).
        expected_drops: the expected number of pruned samples (0 in an epoch that may not prune).
        forward_only_ids: (F,) int64, pruned samples to re-score by a forward pass without training.
        lr_scale: factor on the learning rate of this epoch, > 0.
        sweep: samples, kept or not, that a forward-only pass scores after the epoch: "all", (S,) int64 ids, or None.
        facts: how the selection was made, for metrics.jsonl: name → number, text or list of them.
        batch_mean_weights: every sample of a global batch gets the mean weight of the batch instead of its own.
    """

    codes: NDArray[np.unsignedinteger[Any]]
    weight_values: NDArray[np.float32]
    requested: float = 0.0
    expected_drops: float = 0.0
    forward_only_ids: Ids = field(default_factory=lambda: _NO_IDS)
    lr_scale: float = 1.0
    sweep: Ids | Literal["all"] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    batch_mean_weights: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.requested < 1.0:
            raise ConfigError(f"requested prune ratio {self.requested!r} is outside [0, 1)")
        if not (np.isfinite(self.lr_scale) and self.lr_scale > 0):
            raise ConfigError(f"lr_scale {self.lr_scale!r} is not a positive finite number")
        weights = np.asarray(self.weight_values, dtype=np.float32)
        if weights.size and not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ConfigError(f"weights must be finite and at least 0, got {weights[:5].tolist()}")
        forward_only = check_ids(self.forward_only_ids, self.num_samples)
        if forward_only.size and np.any(self.codes[forward_only]):
            both = forward_only[self.codes[forward_only] != 0]
            raise ConfigError(f"ids {both[:5].tolist()} are kept and forward-only: put each sample in one of the two")
        self._freeze(codes=self.codes, weight_values=weights, forward_only_ids=forward_only)
        if isinstance(self.sweep, str) and self.sweep != "all":
            raise ConfigError(f"sweep {self.sweep!r} must be 'all', ids or None")
        if self.sweep is not None and not isinstance(self.sweep, str):
            self._freeze(sweep=np.unique(check_ids(self.sweep, self.num_samples)))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        # Unpickled arrays are writable.
        arrays = {name: state[name] for name in ("codes", "weight_values", "forward_only_ids", "sweep")}
        self._freeze(**{name: array for name, array in arrays.items() if isinstance(array, np.ndarray)})

    def _freeze(self, **arrays: NDArray[Any]) -> None:
        for name, array in arrays.items():
            frozen = array.view()
            frozen.flags.writeable = False
            object.__setattr__(self, name, frozen)

    @classmethod
    def full(cls, num_samples: int) -> Selection:
        """Keep every sample with weight 1.

        >>> Selection.full(3).ids.tolist(), Selection.full(3).weights.tolist()
        ([0, 1, 2], [1.0, 1.0, 1.0])
        """
        return cls(np.ones(num_samples, dtype=np.uint8), np.ones(1, dtype=np.float32))

    @classmethod
    def of_mask(cls, kept: NDArray[np.bool_], requested: float = 0.0, expected_drops: float = 0.0) -> Selection:
        """Keep the samples where (N,) `kept` is True, with weight 1.

        Raises:
            ConfigError: `kept` is not a 1-d array of bool.

        >>> Selection.of_mask(np.array([True, False])).realised
        0.5
        """
        mask = np.asarray(kept)
        if mask.dtype != bool or mask.ndim != 1:
            raise ConfigError(f"kept must be a 1-d array of bool, got {mask.dtype} of shape {mask.shape}")
        return cls(mask.view(np.uint8), np.ones(1, dtype=np.float32), requested, expected_drops)

    @classmethod
    def of_ids(
        cls,
        ids: ArrayLike,
        num_samples: int,
        *,
        weights: ArrayLike | None = None,
        requested: float = 0.0,
        expected_drops: float = 0.0,
        forward_only_ids: ArrayLike | None = None,
        lr_scale: float = 1.0,
    ) -> Selection:
        """Keep the given ids.

        Args:
            ids: (M,) distinct integers in [0, num_samples), in any order (a Selection is a set: the Plan orders it).
            num_samples: N.
            weights: (M,) finite, at least 0; all 1 by default.
            requested, expected_drops, forward_only_ids, lr_scale: as the attributes.

        Raises:
            ConfigError: ids repeat, are out of range or not integers; weights do not fit.
        """
        kept = check_ids(ids, num_samples)
        codes: NDArray[np.unsignedinteger[Any]] = np.zeros(num_samples, dtype=np.uint8)
        values = np.ones(1, dtype=np.float32)
        if weights is None:
            codes[kept] = 1
        else:
            weights = np.asarray(weights, dtype=np.float32)
            if weights.shape != kept.shape:
                raise ConfigError(f"{weights.shape} weights do not fit {kept.shape} ids")
            values, inverse = np.unique(weights, return_inverse=True)
            codes = codes.astype(np.min_scalar_type(values.size))
            codes[kept] = inverse + 1
        if np.count_nonzero(codes) != kept.size:
            raise ConfigError("ids repeat: a selection holds every kept id once")
        return cls(
            codes,
            values,
            requested=requested,
            expected_drops=expected_drops,
            forward_only_ids=_NO_IDS if forward_only_ids is None else check_ids(forward_only_ids, num_samples),
            lr_scale=lr_scale,
        )

    def with_facts(self, **facts: Any) -> Selection:
        """Return the same selection with more `facts`."""
        return replace(self, facts={**self.facts, **facts})

    @property
    def scored_ids(self) -> Ids | None:
        """(F,) int64 ids of the forward-only pass after the epoch, ascending; None for all samples."""
        if isinstance(self.sweep, str):
            return None
        return self.forward_only_ids if self.sweep is None else np.union1d(self.sweep, self.forward_only_ids)

    @property
    def num_scored(self) -> int:
        """The number of samples in the forward-only pass after the epoch."""
        ids = self.scored_ids
        return self.num_samples if ids is None else int(ids.size)

    @property
    def num_samples(self) -> int:
        """N, kept or not."""
        return int(self.codes.shape[0])

    @cached_property
    def num_kept(self) -> int:
        """M, the number of kept samples."""
        return int(np.count_nonzero(self.codes))

    @cached_property
    def mean_weight(self) -> float:
        """The mean weight of the kept samples: how much larger a mean step is than with weights of 1.

        >>> Selection.of_ids([0, 2], 4, weights=[1.0, 2.0]).mean_weight
        1.5
        """
        values = np.concatenate([np.zeros(1, np.float32), self.weight_values])
        total = sum(float(values[self.codes[rows]].sum(dtype=np.float64)) for rows in chunks(self.num_samples))
        return total / max(self.num_kept, 1)

    @property
    def realised(self) -> float:
        """The share of the N samples that this epoch prunes, in [0, 1]."""
        return 1.0 - self.num_kept / self.num_samples if self.num_samples else 0.0

    @property
    def ids(self) -> Ids:
        """(M,) int64 kept ids in ascending order; computed on each access."""
        return np.flatnonzero(self.codes)

    @property
    def weights(self) -> NDArray[np.float32]:
        """(M,) float32 weights aligned with `ids`; computed on each access."""
        return self.weights_of(self.ids)

    def weights_of(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Return the weights of ids in their order: (B,) integers → (B,) float32 (0 where pruned)."""
        values = np.concatenate([np.zeros(1, np.float32), self.weight_values])
        weights: NDArray[np.float32] = values[self.codes[ids]]
        return weights

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Pack into arrays for a checkpoint: a bitmap of N bits, the kept samples' weight codes, the weights."""
        kept = self.codes != 0
        more = {"sweep": self.sweep if isinstance(self.sweep, str | None) else self.sweep.tolist()}
        more |= {"facts": dict(self.facts), "batch_mean_weights": self.batch_mean_weights}
        return {
            "more": np.frombuffer(json.dumps(more).encode(), dtype=np.uint8),
            "bitmap": np.packbits(kept),
            "weight_codes": self.codes[kept],
            "weight_values": self.weight_values,
            "forward_only_ids": self.forward_only_ids,
            "scalars": np.array([self.requested, self.expected_drops, self.lr_scale], dtype=np.float64),
            "num_samples": np.array(self.num_samples, dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Selection:
        """Unpack the arrays of `to_arrays` into the same Selection, bit for bit.

        Raises:
            RunFolderError: an array is missing, or the arrays do not fit each other.
        """
        if missing := cls.full(1).to_arrays().keys() - arrays.keys():
            raise RunFolderError(f"the stored selection lacks {', '.join(sorted(missing))}")
        num_samples, num_bits = int(arrays["num_samples"]), arrays["bitmap"].size * 8
        if num_bits < num_samples:
            raise RunFolderError(f"the stored selection has {num_bits} bits for {num_samples} samples")
        kept = np.unpackbits(arrays["bitmap"], count=num_samples).view(bool)
        num_kept, kept_codes, values = np.count_nonzero(kept), arrays["weight_codes"], arrays["weight_values"]
        if kept_codes.shape != (num_kept,) or kept_codes.max(initial=0) > values.size or kept_codes.min(initial=1) < 1:
            raise RunFolderError(
                f"the stored selection's {kept_codes.size} weight codes do not fit its {num_kept} kept samples"
            )
        codes = np.zeros(num_samples, dtype=kept_codes.dtype)
        codes[kept] = kept_codes
        requested, expected_drops, lr_scale = (float(value) for value in arrays["scalars"])
        more = json.loads(bytes(arrays["more"]).decode())
        if isinstance(more["sweep"], list):
            more["sweep"] = np.array(more["sweep"], dtype=np.int64)
        return cls(codes, values, requested, expected_drops, arrays["forward_only_ids"], lr_scale, **more)


def check_ids(ids: ArrayLike, num_samples: int) -> Ids:
    """Check ids and return them as (B,) int64.

    Args:
        ids: (B,) of any integer dtype.
        num_samples: N; every id must lie in [0, N).

    Raises:
        ConfigError: another dtype or shape, or an id out of range (the message names the first few).

    >>> check_ids([2, 0], num_samples=3)
    array([2, 0])
    """
    array = np.asarray(ids)
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        # float32 cannot tell id 16,777,217 from its neighbor, so ids that were floats are already wrong.
        raise ConfigError(f"ids must be a 1-d array of integers, got {array.dtype} of shape {array.shape}")
    if array.min() < 0 or array.max() >= num_samples:
        unknown = array[(array < 0) | (array >= num_samples)]
        raise ConfigError(f"unknown ids {unknown[:5].tolist()}: ids go from 0 to {num_samples - 1}")
    return array.astype(np.int64, copy=False)


def check_labels(labels: ArrayLike, num_samples: int) -> NDArray[Any]:
    """Check (N,) labels and return them in the smallest unsigned dtype.

    Raises:
        ConfigError: the labels are not N integers of at least 0, or so large that they look like ids.
    """
    array = np.asarray(labels)
    if array.shape != (num_samples,) or array.dtype.kind not in "iu":
        raise ConfigError(f"labels must be {num_samples} integers, got {array.dtype} of shape {array.shape}")
    if array.min() < 0:
        raise ConfigError(f"labels must be at least 0, got {array.min()}")
    if array.max() >= max(_MAX_CLASSES, _MAX_CLASSES_PER_SAMPLE * num_samples):
        raise ConfigError(f"labels look like ids: the largest of {num_samples} is {array.max()}; number classes from 0")
    return array.astype(np.min_scalar_type(int(array.max())))  # few classes: 1 or 2 bytes per sample, not 8


def top_up(selection: Selection, labels: NDArray[Any], floor: float, rng: np.random.Generator) -> Selection:
    """Add pruned samples with weight 1 to classes that keep less than the share `floor`.

    Methods that thin at random meet the floor without bias in `EpochContext.thin`; nothing is added to them.
    """
    kept = selection.codes != 0
    kept_C = np.bincount(labels[kept], minlength=int(labels.max()) + 1)
    short_C = np.ceil(np.round(floor * np.bincount(labels), 6)).astype(np.int64) - kept_C
    if not (short_C > 0).any():
        return selection
    extra = [
        rng.choice(np.flatnonzero((labels == label) & ~kept), short_C[label], replace=False)
        for label in np.flatnonzero(short_C > 0)
    ]
    ids = np.concatenate([selection.ids, *extra])
    ones = np.ones(ids.size - selection.num_kept, dtype=np.float32)
    filled = Selection.of_ids(ids, selection.num_samples, weights=np.concatenate([selection.weights, ones]))
    forward_only = np.setdiff1d(selection.forward_only_ids, ids)
    return replace(selection, codes=filled.codes, weight_values=filled.weight_values, forward_only_ids=forward_only)


def kept_shares(selection: Selection, labels: NDArray[Any]) -> list[float | None]:
    """Return the kept share of each class, (C,); None for a class without samples.

    >>> kept_shares(Selection.of_ids([0], 3), np.array([0, 0, 2]))
    [0.5, None, 0.0]
    """
    size_C = np.bincount(labels)
    kept_C = np.bincount(labels[selection.codes != 0], minlength=size_C.size)
    return [
        round(kept / size, 6) if size else None for kept, size in zip(kept_C.tolist(), size_C.tolist(), strict=True)
    ]
