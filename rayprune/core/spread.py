"""How scores are spread at the end of an epoch, as a few quantiles: what a report can draw over epochs.

Shapes: N samples.
"""

from __future__ import annotations

import numpy as np

from rayprune.core.table import ScoreTable

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
# Enough for quantiles to a third of a percent of the samples, few enough to cost milliseconds.
_MOST_ROWS = 100_000
_MOST_COLUMNS = 4


def column_quantiles(table: ScoreTable) -> dict[str, list[float]]:
    """Return name → values at QUANTILES of each column of single numbers, over the samples that have one.

    Of more than 100,000 samples, evenly spaced ones stand for all.

    >>> table = ScoreTable(5, {"loss": np.float32}, 1)
    >>> table["loss"][1:] = [1.0, 2.0, 3.0, 4.0]
    >>> column_quantiles(table)["loss"][3]
    2.5
    """
    found: dict[str, list[float]] = {}
    stride = -(-len(table) // _MOST_ROWS)
    for name, column in table.columns.items():
        if column.ndim > 1 or column.dtype.kind != "f" or len(found) == _MOST_COLUMNS:
            continue
        some = column[::stride].astype(np.float64)
        some = some[np.isfinite(some)]
        if some.size:
            found[name] = [round(float(value), 6) for value in np.quantile(some, QUANTILES)]
    return found
