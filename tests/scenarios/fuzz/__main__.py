"""Run many random examples of each target; print their counts; exit with 1 if a promise was broken."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .sandbox import Limits, Sandbox
from .targets import TARGETS, Example, run_example

HEAD = "target              examples  exit 0  exit 1  exit 2  lines  slowest  memory  broken"


def main() -> int:
    """Fuzz the targets; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=500, help="of each target (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the first example (0); the next has the next seed")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    arguments = parser.parse_args()
    broken = 0
    start = time.monotonic()
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="rayprune-fuzz-") as temporary, Sandbox(Limits()) as sandbox:
        for name in arguments.targets:
            good = Path(temporary) / f"good {name}"
            good.mkdir()
            TARGETS[name].make(good, sandbox)
            examples = []
            for seed in range(arguments.seed, arguments.seed + arguments.examples):
                example = run_example(TARGETS[name], good, Path(temporary) / "example", sandbox, seed)
                examples.append(example)
                if example.problems:
                    print(f"seed {seed}: {example}", file=sys.stderr, flush=True)
            broken += sum(bool(example.problems) for example in examples)
            print(row(name, examples), flush=True)
    print(
        f"{broken} of {arguments.examples * len(arguments.targets)} examples broke a promise, "
        f"{time.monotonic() - start:.0f} s"
    )
    return int(broken > 0)


def row(name: str, examples: list[Example]) -> str:
    """Return a target's counts as a line under HEAD; `lines` counts the different errors, without digits."""
    codes = Counter(example.outcome.code for example in examples)
    lines = {"".join(letter for letter in each.outcome.refusal if not letter.isdigit()) for each in examples} - {""}
    slowest = max(example.outcome.seconds for example in examples)
    memory = max(example.outcome.memory for example in examples) / 2**20
    broken = sum(bool(example.problems) for example in examples)
    return (
        f"{name:<18}{len(examples):>10}{codes[0]:>8}{codes[1]:>8}{codes[2]:>8}{len(lines):>7}{slowest:>7.1f} s"
        f"{memory:>5.0f} MB{broken:>8}"
    )


if __name__ == "__main__":
    sys.exit(main())
