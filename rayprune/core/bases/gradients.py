"""Last-layer gradients of all samples, and the base class of static methods that choose by them.

With p a sample's probabilities, y its label and h the inputs of the last layer, the gradient of the cross entropy with
respect to the logits is e = p − onehot(y), and with respect to the last layer's weight and bias the outer product
g = e ⊗ [h, 1]. A forward-only pass gives e and h. The outer products, C·(d+1) numbers for each sample, are never
stored, because inner products factorize: ⟨g_i, g_j⟩ = ⟨e_i, e_j⟩·(1 + ⟨h_i, h_j⟩).

Shapes: N samples, M kept, n samples of a part, C classes, d inputs of the last layer.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayprune.core.bases.static import StaticMethod
from rayprune.core.choosing import quotas
from rayprune.core.method import EpochContext
from rayprune.core.table import Ids, ScoreTable, chunks
from rayprune.core.vectors import SWEEP_CURE, Storage, VectorColumn
from rayprune.errors import ConfigError

_GRID = 2.0**24
_ROWS = 256  # rows of a block of the Gram matrix
_ROUNDING = 1e-13  # of a squared distance, relative to the squared norms
_JITTER = 1e-12
_LEAST_WEIGHT = 1e-6
_PARTS = 3  # keeps the generator of the parts apart from others


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of n samples with respect to the logits, or to the whole last layer.

    Attributes:
        errors: (n, C) floating, p − onehot(y).
        inputs: (n, d) floating, the inputs of the last layer; None for gradients with respect to the logits.
    """

    errors: NDArray[Any]
    inputs: NDArray[Any] | None = None

    def __len__(self) -> int:
        return int(self.errors.shape[0])

    def take(self, rows: Ids | slice) -> Gradients:
        """Return the gradients of some rows."""
        return Gradients(self.errors[rows], None if self.inputs is None else self.inputs[rows])

    def gram(self, rows: slice, columns: slice) -> NDArray[np.float64]:
        """Return the inner products of rows with columns, (rows, columns).

        >>> g = Gradients(np.array([[1.0, -1.0], [0.5, -0.5]]), np.array([[2.0], [3.0]]))
        >>> g.gram(slice(0, 1), slice(0, 2)).tolist()
        [[10.0, 7.0]]
        """
        left, right = self.take(rows)._wide(), self.take(columns)._wide()
        gram: NDArray[np.float64] = left.errors @ right.errors.T
        if left.inputs is not None and right.inputs is not None:
            factor = left.inputs @ right.inputs.T
            factor += 1.0
            gram *= factor
        return gram

    def squared_norms(self) -> NDArray[np.float64]:
        """Return ‖g‖², (n,)."""
        wide = self._wide()
        squares: NDArray[np.float64] = np.einsum("ij,ij->i", wide.errors, wide.errors)
        if wide.inputs is not None:
            squares *= 1.0 + np.einsum("ij,ij->i", wide.inputs, wide.inputs)
        return squares

    def distances(self) -> NDArray[np.float32]:
        """Return the Euclidean distances of all pairs over an upper bound of the largest, (n, n) in [0, 1].

        They are multiples of 2⁻²⁴: their differences are exact in float32 and sums of these in float64, so that equal
        sums are equal numbers, in any order and on any machine. A distance that rounding cannot tell from 0 is 0.
        """
        wide, squares = self._wide(), self.squared_norms()
        scale = 2.0 * float(np.sqrt(squares.max(initial=0.0))) or 1.0
        matrix = np.empty((len(self), len(self)), dtype=np.float32)
        for start in range(0, len(self), _ROWS):
            rows, rest = slice(start, start + _ROWS), slice(start, None)
            block, sums = wide.gram(rows, rest), squares[rows, None] + squares[None, rest]
            block *= -2.0
            block += sums
            block[block <= _ROUNDING * sums] = 0.0
            np.sqrt(block, out=block)
            block *= _GRID / scale
            np.rint(block, out=block)
            block /= _GRID
            matrix[rows, rest] = block
            matrix[rest, rows] = matrix[rows, rest].T
        return matrix

    def features(self) -> NDArray[np.float64]:
        """Return vectors with the same inner products, (n, D) with D at most max(n, C)."""
        wide = self._wide()
        if wide.inputs is None:
            return wide.errors
        if wide.errors.shape[1] * (wide.inputs.shape[1] + 1) <= len(self):
            extended = np.concatenate([wide.inputs, np.ones((len(self), 1))], axis=1)
            return np.asarray(wide.errors[:, :, None] * extended[:, None, :]).reshape(len(self), -1)
        gram = wide.gram(slice(None), slice(None))
        largest = float(gram.diagonal().max())
        if largest == 0.0:
            return np.zeros((len(self), 1))
        # The Gram matrix may be singular.
        gram.flat[:: len(self) + 1] += _JITTER * largest
        return np.asarray(np.linalg.cholesky(gram), dtype=np.float64)

    def total(self) -> NDArray[np.float64]:
        """Return the sum of the gradients, (C, 1) or (C, d+1) with the bias last.

        >>> Gradients(np.array([[1.0, -1.0], [0.5, -0.5]]), np.array([[2.0], [3.0]])).total().tolist()
        [[3.5, 1.5], [-3.5, -1.5]]
        """
        bias: NDArray[np.float64] = self.errors.sum(axis=0, dtype=np.float64)[:, None]
        if self.inputs is None:
            return bias
        weight = np.zeros((bias.size, self.inputs.shape[1]))
        for rows in self._chunks():
            part = self.take(rows)._wide()
            assert part.inputs is not None
            weight += part.errors.T @ part.inputs
        return np.concatenate([weight, bias], axis=1)

    def products(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the inner products with one gradient of the form of `total`, (n,)."""
        result = np.empty(len(self), dtype=np.float64)
        for rows in self._chunks():
            part = self.take(rows)._wide()
            result[rows] = part.errors @ matrix[:, -1]
            if part.inputs is not None:
                result[rows] += np.einsum("id,id->i", part.errors @ matrix[:, :-1], part.inputs)
        return result

    def logit_changes(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how the samples' logits change if `matrix`, of the form of `total`, is added to the layer, (n, C)."""
        changes = np.repeat(matrix[None, :, -1], len(self), axis=0)
        if self.inputs is not None:
            changes += self.inputs @ matrix[:, :-1].T
        return changes

    def _chunks(self) -> Iterator[slice]:
        return chunks(len(self), max(self.errors.shape[1], 0 if self.inputs is None else self.inputs.shape[1]))

    def _wide(self) -> Gradients:
        """Return the gradients in float64."""
        inputs = None if self.inputs is None else self.inputs.astype(np.float64, copy=False)
        return Gradients(self.errors.astype(np.float64, copy=False), inputs)


@dataclass(frozen=True)
class GradientMethod(StaticMethod):
    """Keep a weighted subset that is chosen by the last-layer gradients after T epochs.

    After the forward-only pass, `condense` divides the samples into parts (classes, and random parts of large ones)
    with quotas that sum to M, and `pick` chooses inside each part. The column `weight` holds the method's own weights,
    0 = dropped; training gets them divided by their mean over the M kept samples. They then sum to M, and the step is
    as large as without weights: rayprune divides the weighted sum of a batch's losses by the number of its rows.

    Args:
        score_epochs: T ≥ 1, the number of epochs of the scoring run.
        gradient: `logits` compares gradients with respect to the logits, C numbers per sample on the disk;
            `last_layer` those of the last layer's weight and bias, C + d numbers per sample. An inner product takes C
            or C + d multiplications.
        balance: `proportional` chooses class by class and keeps the same share of each, `even` the same number of
            each; `none` ignores classes.
        partition_size: largest number of samples of a part, ≥ 2; larger ones are split at random into equal parts, each
            with its share of the quota. null never splits.
        storage: how the vectors are stored on the disk: float32, or float16 in half the space.
    """

    # The prune ratio is no selection field: it sets the weights, which are the scores.
    selection_fields = ("class_floor",)

    score_epochs: int = 10
    _: KW_ONLY
    gradient: Literal["logits", "last_layer"] = "logits"
    balance: Literal["proportional", "even", "none"] = "proportional"
    partition_size: int | None = None
    storage: Storage = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition_size is not None and self.partition_size < 2:
            raise ConfigError(f"partition_size {self.partition_size} must be at least 2, or null to split no class")
        names = ("logit_gradient",) if self.gradient == "logits" else ("logit_gradient", "embedding")
        object.__setattr__(self, "sweep_signals", names)
        object.__setattr__(self, "needs_labels", self.balance != "none")

    @property
    def collect_epochs(self) -> int:
        """T."""
        return self.score_epochs

    def columns(self) -> Mapping[str, Any]:
        """Return the vectors of the forward-only pass, the weight and the last loss."""
        vectors = {name: VectorColumn(self.storage) for name in self.sweep_signals}
        return {"loss": np.float32, "weight": np.float32, **vectors}

    @abc.abstractmethod
    def pick(
        self, gradients: Gradients, count: int, label: int | None, rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return the weights of a part's samples, (n,); exactly `count` of them are above 0.

        Args:
            gradients: of n samples, in the order of their ids.
            count: in [1, n).
            label: the class of the part; None if classes are ignored.
            rng: for draws.
        """

    def condense(self, table: ScoreTable, context: EpochContext) -> None:
        """Write the weights of the chosen samples, 0 for the others."""
        arrays = [table.vectors[name].array for name in self.sweep_signals]
        weights = np.zeros(context.num_samples, dtype=np.float64)
        rng = context.derived_rng(_PARTS, epoch=self.collect_epochs)
        for ids, count, label in self._parts(context, rng):
            if 0 < count < ids.size:
                # Vectors in float16 are too coarse to add up.
                gradients = Gradients(*(array[ids].astype(np.float32, copy=False) for array in arrays))
                weights[ids] = self.pick(gradients, count, label, rng)
            elif count:
                weights[ids] = 1.0  # all of them, at their own weight
        kept = weights > 0.0
        # So that float32 cannot lose a kept sample.
        weights[kept] = np.maximum(weights[kept], _LEAST_WEIGHT * weights[kept].mean())
        table["weight"][:] = weights

    def _parts(self, context: EpochContext, rng: np.random.Generator) -> Iterator[tuple[Ids, int, int | None]]:
        """Yield (ids, quota, class) of each part; ids ascend."""
        num, count = context.num_samples, self.num_kept(context.num_samples)
        if self.balance == "none" or context.labels is None:
            classes: list[tuple[Ids, int, int | None]] = [(np.arange(num), count, None)]
        else:
            present, sizes = np.unique(context.labels, return_counts=True)
            ids = np.split(np.argsort(context.labels, kind="stable"), np.cumsum(sizes)[:-1])
            classes = list(zip(ids, quotas(sizes, count, self.balance).tolist(), present.tolist(), strict=True))
        for members, quota, label in classes:
            if self.partition_size is None or members.size <= self.partition_size:
                yield members, quota, label
                continue
            num_parts = -(-members.size // self.partition_size)
            parts = np.array_split(rng.permutation(members), num_parts)
            shares = quotas(np.array([part.size for part in parts]), quota, "proportional").tolist()
            for part, share in zip(parts, shares, strict=True):
                yield np.sort(part), share, label

    def scores(self, table: ScoreTable) -> dict[str, NDArray[Any]]:
        """Return the method's own weights, (N,) float32; 0 where the sample is dropped."""
        return {f"{self.name}_weight": table["weight"]}

    def subset(
        self, table: ScoreTable, context: EpochContext, count: int
    ) -> tuple[Ids, NDArray[np.float32] | None, dict[str, Any]]:
        """Return the samples with a weight, and the weights over their mean.

        Raises:
            ConfigError: the forward-only pass was not made, or for another number of samples.
        """
        weights = table["weight"]
        if missing := np.count_nonzero(np.isnan(weights)):
            raise ConfigError(
                f"epoch {context.epoch}: {missing} samples have no {' and '.join(self.sweep_signals)}: {SWEEP_CURE}"
            )
        ids = np.flatnonzero(weights)
        if ids.size != count:
            raise ConfigError(
                f"the scoring run chose {ids.size} samples, and prune_ratio {self.prune_ratio} keeps {count}: score "
                "again, as the weights depend on the ratio"
            )
        own = weights[ids].astype(np.float64)
        facts = {"score": f"{self.name}_weight", "weight_sum": float(own.sum())}
        return ids, None if (own == own[0]).all() else (own / own.mean()).astype(np.float32), facts


def first_largest(values: NDArray[np.float64], count: int, tolerance: float = 1e-12) -> Ids:
    """Return the positions of the `count` largest values, ascending; equal ones are taken in order.

    Args:
        values: (n,) finite, or −inf.
        count: in [1, n].
        tolerance: values that differ by less than this share of the largest absolute value count as equal, because
            matrix products round equal rows differently.

    >>> first_largest(np.array([1.0, 3.0, 2.0, 3.0 - 1e-15, 2.0]), 3).tolist()
    [1, 2, 3]
    """
    finite = values[np.isfinite(values)]
    slack = tolerance * float(np.abs(finite).max(initial=0.0))
    if count == 1:
        return np.array([np.argmax(values >= values.max() - slack)])
    bound = np.partition(values, -count)[-count]
    above, equal = values > bound + slack, np.abs(values - bound) <= slack
    room = count - int(np.count_nonzero(above))
    above[np.flatnonzero(equal)[:room]] = True
    return np.flatnonzero(above)
