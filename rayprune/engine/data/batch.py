"""One rank's share of a global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PlacedRows:
    """What the plan says of rows, on a device: ids (R,) int64, weights (R,) float32, real (R,) bool."""

    ids: Tensor
    weights: Tensor
    real: Tensor

    def __getitem__(self, part: slice) -> PlacedRows:
        """Return some of the rows."""
        return PlacedRows(self.ids[part], self.weights[part], self.real[part])


Columns = Mapping[str, "NDArray[Any] | Tensor"]


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch.

    Attributes:
        columns: name → (B, …) as the source delivers them, arrays or tensors.
        ids: (B,) int64.
        weights: (B,) float32, 0 for padding.
        real: (B,) False for padding.
        num_bytes: what was read from storage since the batch before; the first batch of what is read at once has all.
        placed: ids, weights and real on the device, where the transport has put them and the columns there.
    """

    columns: Columns
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    real: NDArray[np.bool_]
    num_bytes: int = 0
    placed: PlacedRows | None = None
