"""Run benchmarks by name, or all but the long ones: `python -m benchmarks [plan actor recording …]`.

A name is a module of this folder, whose `figures` are printed, or MODULE.FUNCTION for other rows of it.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator

import ray

from benchmarks.harness import HEADER, Figure, Head, Row, machine

NAMES = (
    *(
        "plan",
        "actor",
        "recording",
        "saving",
        "boundary",
        "stream",
        "sources",
        "own_dataset",
        "decoding",
        "tdds",
        "methods",
        "vectors",
        "near_duplicates",
        "l2w",
        "prompts",
    ),
    *("host", "overhead", "plain", "start", "psp", "scaling", "gpu"),
)
# Long or memory-hungry: they run only when named.
BY_NAME = (
    "soak",
    "billion",
    "imagenet",
    "imagenet.stream",
    "imagenet.files",
    "imagenet.state",
    "shards",
    "two_workers",
    "verdicts",
    "vectors.slow",
    "vectors.k_center",
    "vectors.craig",
    "near_duplicates.million",
    "audit",
    "audit.synthetic",
    "prompts.grpo",
)


def figures_of(name: str) -> Iterator[Figure | Head | Row]:
    """Return the rows of one benchmark."""
    module, _, function = name.partition(".")
    rows: Iterator[Figure | Head | Row] = getattr(
        importlib.import_module(f"benchmarks.{module}"), function or "figures"
    )()
    return rows


def main() -> int:
    """Print the table; return 1 when a goal is missed."""
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in (*NAMES, *BY_NAME)]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}: choose from {', '.join((*NAMES, *BY_NAME))}", file=sys.stderr)
        return 2
    print(machine(), f"command: python -m benchmarks {' '.join(names)}", "", HEADER, sep="\n", flush=True)
    missed = False
    for name in names:
        start = time.perf_counter()
        for figure in figures_of(name):
            print(figure.row(), flush=True)
            missed |= figure.holds == "NO"
        ray.shutdown()  # the next benchmark gets the whole machine and a Ray of its own
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
