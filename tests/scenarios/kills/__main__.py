"""`python -m tests.scenarios.kills`: the long form; exits with 1 when a disturbance changed or ended a run."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from .campaign import Campaign, Outcome, undisturbed_run
from .command import kill_command
from .driver import Driver, configuration
from .kinds import KINDS
from .report import line, table
from .schedule import draw_kinds, draw_run
from .storage import small_file_system

EPOCHS, KILLS_PER_RUN = 10, 14


def main() -> int:
    """Torture runs until all disturbances are done; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios.kills", description=__doc__)
    parser.add_argument("--kills", type=int, help="disturbances in all (56; 3 with --config)")
    parser.add_argument("--seed", type=int, default=0, help="of their kinds and steps (0)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="only these kinds")
    parser.add_argument("--folder", type=Path, help="where the runs' folders are kept (default: a temporary one)")
    parser.add_argument("--config", type=Path, help="kill `rayprune train CONFIG` instead, by SIGKILL of the command")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayprune-torture-") as temporary:
        folder = asked.folder or Path(temporary)
        if asked.config is not None:
            return kill_command(asked.config, asked.kills or 3, asked.seed, folder, _say)
        return _torture(asked.kills or 56, asked.seed, asked.kinds, folder)


def _torture(kills: int, seed: int, names: list[str], folder: Path) -> int:
    start, rng = time.monotonic(), random.Random(seed)
    with small_file_system(folder / "small") as mounted:
        skipped = [name for name in names if KINDS[name].needs_tmpfs and not mounted]
        for name in skipped:
            _say(f"SKIPPED {name}: a small file system cannot be mounted here (that needs root)")
        kinds = draw_kinds(kills, [name for name in names if name not in skipped], rng)
        whole = Driver(folder / "undisturbed", configuration(EPOCHS))
        steps = undisturbed_run(whole)
        _say(f"undisturbed: steps of the epochs {steps}, {time.monotonic() - start:.0f} s")
        outcomes: list[Outcome] = []
        failed = False
        for number, first in enumerate(range(0, kills, KILLS_PER_RUN), start=1):
            schedule = draw_run(kinds[first : first + KILLS_PER_RUN], steps, rng)
            driver = Driver(
                folder / f"run-{number}", configuration(EPOCHS), folder / "small" / f"run-{number}" / "storage"
            )
            ended = Campaign(driver, steps, rng, lambda one: _say(line(one))).run(schedule, whole.folder)
            outcomes += ended.outcomes
            failed |= bool(ended.different) or len(ended.outcomes) < len(schedule)
            verdict = "equal to the undisturbed run" if not ended.different else "; ".join(ended.different[:5])
            _say(
                f"run {number}: {verdict}; {len(ended.outcomes)} of {len(schedule)} done, {ended.redone} of "
                f"{sum(steps)} steps done again, {time.monotonic() - start:.0f} s so far"
            )
    _say(f"\n{table(outcomes)}\n\n{len(outcomes)} disturbances in {time.monotonic() - start:.0f} s")
    return int(failed or any(outcome.lost for outcome in outcomes))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
