"""Run benchmarks by name, or all.

python -m benchmarks [plan actor recording boundary stream decoding tdds l2w gpu]
"""

from __future__ import annotations

import importlib
import sys

from benchmarks.harness import HEADER, machine

NAMES = ("plan", "actor", "recording", "boundary", "stream", "decoding", "tdds", "l2w", "gpu")


def main() -> int:
    """Print the table; return 1 when a goal is missed."""
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}: choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    print(machine(), f"command: python -m benchmarks {' '.join(names)}", "", HEADER, sep="\n", flush=True)
    missed = False
    for name in names:
        for figure in importlib.import_module(f"benchmarks.{name}").figures():
            print(figure.row(), flush=True)
            missed |= figure.holds == "NO"
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
