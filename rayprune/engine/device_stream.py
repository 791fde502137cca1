"""The transport `stream: device`: the decoded rows lie on the worker's device, and a batch is an index into them.

For data that fit: every worker loads each of its sources once, whole, in the order of the ids, when it is first asked
for a batch of it. From then on a slice of the plan is one small copy of ids, weights and mask for tens of thousands of
rows, and an `index_select` a batch. Plans, batches, order and results are those of `stream: local`.

Shapes: N samples of a source, B rows of a batch, R rows of a share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import psutil
import torch
from torch import Tensor

from rayprune.engine.placing import Copies, host_tensor, packed, unpacked
from rayprune.engine.protocol import PlanPass, RankRows
from rayprune.engine.stream import Batch
from rayprune.sources import SampleSource, Schema

LOAD_BYTES = 64 * 1024 * 1024
# The network, its gradients and activations need room too.
_SHARE_OF_FREE = 0.8
_ELSE = "use stream local or auto"


def check_columns(schema: Schema) -> None:
    """Refuse columns that no tensor holds, such as text.

    Raises:
        ValueError: the first of them, with the cure.
    """
    for name, column in schema.columns.items():
        try:
            torch.from_numpy(np.zeros(1, column.dtype)).index_select(0, torch.zeros(1, dtype=torch.int64))
        except (TypeError, RuntimeError):
            raise ValueError(
                f"stream device: column {name!r} is of type {column.dtype}, which tensors do not hold: {_ELSE}"
            ) from None


def check_room(sources: Mapping[str, SampleSource], device: torch.device) -> None:
    """Refuse data that do not fit into the memory that is free on a device.

    Raises:
        ValueError: they do not, with their size and the cure.
    """
    needed = sum(len(source) * source.schema.row_bytes for source in sources.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > _SHARE_OF_FREE * free:
        raise ValueError(
            f"stream device: decoded, the samples take {needed / 2**30:.3g} GiB, and of the {free / 2**30:.3g} GiB "
            f"that are free on {device} {_SHARE_OF_FREE:.0%} may be used: {_ELSE}, or fewer samples (data.limit)"
        )


class DeviceStream:
    """Index rows that lie on the device.

    Args:
        sources: "train" and, where there is one, "validation".
        device: where batches are wanted.
    """

    resumes_inside = True

    def __init__(self, sources: Mapping[str, SampleSource], device: torch.device) -> None:
        self._sources, self._device, self._copies = sources, device, Copies(device)
        self._resident: dict[str, dict[str, Tensor]] = {}

    def batches(self, plan_pass: PlanPass, shares: Iterator[RankRows], batch_rows: int) -> Iterator[Batch]:
        """See Transport; a batch's columns are tensors on the device, and `placed` is set."""
        columns, num_bytes = self._loaded("validation" if plan_pass.phase == "validate" else "train")
        for ids, weights, real in shares:
            (buffer,) = self._copies(packed(ids, weights, real))
            rows = unpacked(buffer)
            for start in range(0, ids.size, batch_rows):
                part = slice(start, start + batch_rows)
                placed = rows[part]
                cut = {name: column.index_select(0, placed.ids) for name, column in columns.items()}
                yield Batch(cut, ids[part], weights[part], real[part], num_bytes, placed)
                num_bytes = 0

    def _loaded(self, part: str) -> tuple[dict[str, Tensor], int]:
        """Return a source's columns, name → (N, …), and the bytes that were read for them just now."""
        if part in self._resident:
            return self._resident[part], 0
        if not self._resident:
            check_room(self._sources, self._device)  # of all that will lie there
        source = self._sources[part]
        check_columns(source.schema)
        self._resident[part], num_bytes = _load(source, self._device)
        return self._resident[part], num_bytes


def _load(source: SampleSource, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """Read a source from its first row to its last, in pieces; return its columns on the device and the bytes read."""
    columns: dict[str, Tensor] = {}
    for name, column in source.schema.columns.items():
        dtype = torch.from_numpy(np.zeros(0, column.dtype)).dtype
        columns[name] = torch.empty((len(source), *column.shape), dtype=dtype, device=device)
    num_bytes, rows = 0, max(1, LOAD_BYTES // max(1, source.schema.row_bytes))
    for start in range(0, len(source), rows):
        ids = np.arange(start, min(start + rows, len(source)), dtype=np.int64)
        read, size = source.read(ids)
        num_bytes += size
        for name, column_N in columns.items():
            piece = host_tensor(read[name], pin=device.type == "cuda")
            column_N[start : start + ids.size].copy_(piece, non_blocking=True)
    return columns, num_bytes
