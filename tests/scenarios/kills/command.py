"""Kill `rayprune train CONFIG` inside epochs, for any config, and compare its end with an undisturbed run."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from rayprune.engine.storage.checkpoint import newest_position
from rayprune.engine.storage.run_folder import read_metrics

from .campaign import Stalled, undisturbed_run
from .driver import Driver, running
from .oracle import differences
from .processes import descendants, kill

_POLL_S, _STALL_S = 0.02, 300.0
_CHECKPOINT_STEPS = 3


def kill_command(config_file: Path, kills: int, seed: int, folder: Path, say: Callable[[str], None]) -> int:
    """Train once undisturbed and once killed `kills` times and started again; return the exit code: 0 when equal.

    The killed run saves every few steps, so that it goes on inside an epoch; how often it saves decides nothing else.
    """
    config, rng = yaml.safe_load(config_file.read_text()), random.Random(seed)
    often = {**config, "run": {**config.get("run", {}), "checkpoint_steps": _CHECKPOINT_STEPS}}
    whole, driver = Driver(folder / "undisturbed", config), Driver(folder / "killed", often)
    undisturbed_run(whole)
    epochs = len(read_metrics(whole.folder))
    with running(driver):
        # Never in the first epoch, whose length is not known, nor in the last, which a slow look may miss.
        for epoch in sorted(rng.sample(range(1, epochs - 1), kills)):
            _wait_for_epoch(driver, epoch)
            # The shortest so far: an epoch after a start waits for the stream.
            epoch_s = min(line["seconds"]["epoch"] for line in read_metrics(driver.folder))
            time.sleep(rng.uniform(0.1, 0.8) * epoch_s)
            kill(driver.pid, *descendants(driver.pid))  # all at once, as when the machine is lost
            driver.kill()
            position = newest_position(driver.folder)
            say(f"killed in epoch {epoch}; goes on before step {position[1]} of epoch {position[0]}")
            driver.start()
        _wait_for_epoch(driver, epochs)
        while driver.ended() is None:
            time.sleep(_POLL_S)
    say("\n| epoch | plan hash | samples trained | val accuracy | equal |\n|---:|---|---:|---:|---|")
    for ours, theirs in zip(read_metrics(driver.folder), read_metrics(whole.folder), strict=True):
        told = [ours[key] for key in ("plan_hash", "samples_trained", "val_accuracy")]
        equal = "yes" if told == [theirs[key] for key in ("plan_hash", "samples_trained", "val_accuracy")] else "NO"
        say(f"| {ours['epoch']} | {told[0][:12]} | {told[1]} | {told[2]:.4f} | {equal} |")
    different = differences(driver.folder, whole.folder)
    say(f"\n{kills} kills: " + ("; ".join(different) or "metrics, weights and scores equal the undisturbed run's"))
    return int(bool(different))


def _wait_for_epoch(driver: Driver, epoch: int) -> None:
    """Wait until `epoch` epochs have their line: the next one is running."""
    end = time.monotonic() + _STALL_S
    while len(read_metrics(driver.folder)) < epoch:
        if driver.ended() not in {None, 0} or time.monotonic() > end:
            raise Stalled(f"epoch {epoch} did not come: {driver.last_words()}")
        time.sleep(_POLL_S)
