"""A comparison as plain lines: a table of the arms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rayprune.report.compared import HEADS, compare_rows


def compare_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a comparison; the first line is its head.

    Args:
        report: what compare.json holds.
    """
    rows = [HEADS, *compare_rows(report)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join([row[0].ljust(widths[0]), *cells])
