"""Kill `rayprune train CONFIG` inside epochs, for any config, and compare its end with an uninterrupted run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.run_folder import read_metrics

from .campaign import Stalled, run_reference
from .driver import Driver, kill, running
from .results import differences

_POLL_S, _STALL_S = 0.02, 300.0
_CHECKPOINT_STEPS = 3
_SHOWN_KEYS = ("plan_hash", "samples_trained", "val_accuracy")


def kill_command(config_file: Path, kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> int:
    """Train once without kills, once killed and restarted `kills` times; return the exit code, 0 for equal runs.

    The killed run saves every few steps, so that it continues inside an epoch. This changes nothing else.
    """
    config, rng = yaml.safe_load(config_file.read_text()), random.Random(seed)
    saving = {**config, "run": {**config.get("run", {}), "checkpoint_steps": _CHECKPOINT_STEPS}}
    reference, driver = Driver(folder / "reference", config), Driver(folder / "killed", saving)
    run_reference(reference)
    epochs = len(read_metrics(reference.folder))
    with running(driver):
        # Not in the first epoch, whose duration is unknown, nor in the last one, which may end before it is noticed.
        for epoch in sorted(rng.sample(range(1, epochs - 1), kills)):
            _wait_for_epoch(driver, epoch)
            # The shortest one so far: the first epoch after a start waits for the stream.
            epoch_s = min(line["seconds"]["epoch"] for line in read_metrics(driver.folder))
            time.sleep(rng.uniform(0.1, 0.8) * epoch_s)
            kill(*driver.processes())  # all at once, as when the machine is lost
            driver.kill()
            position = newest_position(driver.folder)
            say(f"killed in epoch {epoch}; continues before step {position[1]} of epoch {position[0]}")
            driver.start()
        _wait_for_epoch(driver, epochs)
        while driver.exit_code() is None:
            time.sleep(_POLL_S)
    say("\n| epoch | plan hash | samples trained | val accuracy | equal |\n|---:|---|---:|---:|---|")
    for line, expected in zip(read_metrics(driver.folder), read_metrics(reference.folder), strict=True):
        plan_hash, trained, accuracy = (line[key] for key in _SHOWN_KEYS)
        equal = "yes" if all(line[key] == expected[key] for key in _SHOWN_KEYS) else "NO"
        say(f"| {line['epoch']} | {plan_hash[:12]} | {trained} | {accuracy:.4f} | {equal} |")
    texts = differences(driver.folder, reference.folder)
    say(f"\n{kills} kills: " + ("; ".join(texts) or "metrics, weights and scores equal those of the reference run"))
    return int(bool(texts))


def _wait_for_epoch(driver: Driver, epoch: int) -> None:
    """Wait until `epoch` epochs have a line in metrics.jsonl, so that the next one is in progress."""
    end = time.monotonic() + _STALL_S
    while len(read_metrics(driver.folder)) < epoch:
        if driver.exit_code() not in {None, 0} or time.monotonic() > end:
            raise Stalled(f"epoch {epoch} was not reached: {driver.last_output()}")
        time.sleep(_POLL_S)
