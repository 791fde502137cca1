"""One rank's part of a global batch.

Shapes: B rows of a batch on one rank, R rows of any number of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Columns = Mapping[str, "NDArray[Any] | Tensor"]


@dataclass(frozen=True)
class PlacedRows:
    """Rows of a plan on a device: ids (R,) int64, weights (R,) float32, real (R,) bool."""

    ids: Tensor
    weights: Tensor
    real: Tensor

    def __getitem__(self, rows: slice) -> PlacedRows:
        return PlacedRows(self.ids[rows], self.weights[rows], self.real[rows])


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        columns: name → (B, …) as the source delivers them, arrays or tensors.
        ids: (B,) int64.
        weights: (B,) float32, 0 for padding.
        real: (B,) bool, False for padding.
        num_bytes: bytes read from storage since the last batch; the first batch of a read carries all of them.
        placed: ids, weights and real on the device, if the transport has put them and the columns there.
    """

    columns: Columns
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    real: NDArray[np.bool_]
    num_bytes: int = 0
    placed: PlacedRows | None = None
