"""Inject faults into runs at random steps; exit with 1 when a fault changed or ended a run."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from .campaign import Campaign, Outcome, draw_faults, draw_schedule, run_reference, steps_per_epoch
from .command import kill_command
from .driver import Driver, configuration
from .faults import FAULTS, small_file_system
from .results import line, table

EPOCHS, FAULTS_PER_RUN = 10, 14
STREAMS = ("ray", "local")


def main() -> int:
    """Run until all faults are done; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios.kills", description=__doc__)
    parser.add_argument("--kills", type=int, help="number of faults (56; 3 with --config)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their kinds and steps (0)")
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="only these kinds")
    parser.add_argument("--folder", type=Path, help="where to keep the run folders (default: a temporary folder)")
    parser.add_argument("--config", type=Path, help="instead, kill the command `rayprune train CONFIG` by SIGKILL")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayprune-kills-") as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.config is not None:
            return kill_command(arguments.config, arguments.kills or 3, arguments.seed, folder, _say)
        return _run(arguments.kills or 56, arguments.seed, arguments.kinds, folder)


def _run(count: int, seed: int, names: list[str], folder: Path) -> int:
    start, rng = time.monotonic(), random.Random(seed)
    with small_file_system(folder / "small") as mounted:
        skipped = [name for name in names if FAULTS[name].needs_tmpfs and not mounted]
        for name in skipped:
            _say(f"SKIPPED {name}: mounting a small file system needs root")
        faults = draw_faults(count, [name for name in names if name not in skipped], rng)
        reference = Driver(folder / "reference", configuration(EPOCHS))
        run_reference(reference)
        steps = steps_per_epoch(reference.folder)
        _say(f"reference run: steps per epoch {steps}, {time.monotonic() - start:.0f} s")
        outcomes: list[Outcome] = []
        failed, number = False, 0
        while faults:
            number += 1
            stream, due = STREAMS[(number - 1) % len(STREAMS)], faults[:FAULTS_PER_RUN]
            if stream == "local":  # which has no split coordinator
                due = [FAULTS["worker"] if fault.name == "split_coordinator" else fault for fault in due]
            schedule = draw_schedule(due, steps, rng)
            storage = folder / "small" / f"run-{number}" / "storage"
            driver = Driver(folder / f"run-{number}", configuration(EPOCHS, stream=stream), storage)
            run = Campaign(driver, steps, rng, lambda one: _say(line(one))).run(schedule, reference.folder)
            outcomes += run.outcomes
            # After a late fault, the end may come before the next one is due: it strikes in the next run.
            faults = run.left + faults[FAULTS_PER_RUN:]
            failed |= bool(run.differences)
            verdict = "; ".join(run.differences[:5]) or "equal to the reference run"
            _say(
                f"run {number}, stream {stream}: {verdict}; {len(run.outcomes)} of {len(schedule)} faults, "
                f"{run.num_repeated} of {sum(steps)} steps repeated, {time.monotonic() - start:.0f} s so far"
            )
            if not run.outcomes:
                break
    _say(f"\n{table(outcomes)}\n\n{len(outcomes)} faults in {time.monotonic() - start:.0f} s")
    return int(failed or bool(faults) or any(outcome.lost for outcome in outcomes))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
