"""Is pruning worth it here? Every arm with every seed is an ordinary run; what they reached is compared seed by seed.

<storage_path>/<name>/   compare.yaml, runs/<arm>-seed<k>/, compare.json, compare.csv

Runs whose seconds count come one after another, so that they are those of a machine that does nothing else, and seed
by seed, so that a machine that slows down does so for full training and the methods alike. A finished run is not
repeated.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from pathlib import Path

import ray
import torch

from rayprune.config import Config, make_config
from rayprune.core.comparison import ArmRuns, RunOutcome, summary
from rayprune.engine.arms import Arm, arms_of, digest_of
from rayprune.engine.compare_runs import ComparedRuns, Watching
from rayprune.engine.connecting import cluster_address
from rayprune.engine.ending import on_sigterm
from rayprune.engine.opening import run_folder_of, sole_use
from rayprune.engine.resources import start_ray
from rayprune.engine.run_folder import write_whole
from rayprune.engine.shares import Asked, Share, share_resources
from rayprune.engine.train import check, open_splits
from rayprune.methods import build_method
from rayprune.overrides import read_yaml
from rayprune.sources import SampleSource, Splits, open_data

__all__ = ["Watching", "compare"]

_SECONDS = "seconds of training and selection, without validation"


def compare(config: Config, watching: Watching | None = None, *, debug: bool = False) -> Path:
    """Run all arms with all seeds, from where the comparison's folder stands, and write what they say.

    Args:
        config: a resolved config, with `run.name` set to the name of the comparison's folder.
        watching: who hears of it.
        debug: show Ray's own logs.

    Returns:
        The folder, with compare.json and compare.csv.

    Raises:
        ValueError: the config can't be compared, or the folder is another comparison's; one line with the cure.
    """
    watching = watching or Watching()
    folder = run_folder_of(config)
    arms, notes = arms_of(config)
    splits, resolution = _validated_data(config)
    if config.compare.margin < resolution:
        notes.append(
            f"the margin of {config.compare.margin:g} points is less than one sample ({resolution:.2g} points)"
        )
    if len(config.compare.all_seeds) == 1:
        notes.append("one seed: no interval can be given, and no verdict follows from it; set compare.seeds=3")
    for note in notes:
        watching.on_notice(note)
    _check_folder(folder, config)
    if not folder.exists():
        check(config, open_splits(config))  # a mistake shows before anything is written
    config = _settled(config, folder)
    share = _share(config, splits.train, len(arms), debug)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_use(folder):
        write_whole(folder / "threads.json", json.dumps(_threads(config, share)) + "\n")
        write_whole(folder / "compare.yaml", config.to_yaml())
        runs = ComparedRuns(config, folder, splits.train.fingerprint, watching, share, debug)
        with on_sigterm():
            by_arm = runs.all_of(arms, config.compare.all_seeds)
        all_runs = [
            ArmRuns(arm.name, arm.baseline, arm.method_arm, by_arm[arm.name], _caveat(config, arm)) for arm in arms
        ]
        report = {
            "digest": digest_of(config),
            "notes": notes,
            "timing": _timing(all_runs),
            "amortise": config.compare.amortise,
            "methods_compared": {arm.name: dict(arm.of) for arm in arms if arm.baseline == "method"},
            **summary(all_runs, config.compare.margin, config.compare.confidence, resolution),
            "environment": json.loads((folder / "runs" / by_arm["full"][0].folder / "environment.json").read_text()),
        }
        write_whole(folder / "compare.json", json.dumps(report, indent=1) + "\n")
        write_whole(folder / "compare.csv", _csv(all_runs))
    return folder


def _share(config: Config, source: SampleSource, num_arms: int, debug: bool) -> Share | None:
    """Return how many runs go at a time and what each gets; None for one after another, with all there is.

    Raises:
        ValueError: there is no room for so many.
    """
    section = config.compare
    asked = Asked(section.parallel, "compare.parallel", "run")
    num_shared = num_arms * max(0, len(section.all_seeds) - section.timed_seeds)
    if section.parallel == 1 or (section.parallel == "auto" and not num_shared):
        return None
    if isinstance(config.scaling.num_workers, tuple) and section.parallel == "auto":
        return None
    if config.scaling.num_workers == 0 and cluster_address(config.run.address) is None:
        # What Ray would find on this machine: it need not be started to see that one run at a time fits.
        total = {"CPU": float(len(os.sched_getaffinity(0))), "GPU": float(torch.cuda.device_count())}
    else:
        start_ray(debug, dashboard=config.scaling.num_workers != 0, address=config.run.address)
        total = ray.cluster_resources()
    share = share_resources(config, source, max(1, num_shared), asked, total)
    return share if share.num_concurrent > 1 else None


def _caveat(config: Config, arm: Arm) -> str:
    """Say that a method's seconds hold a part of its scoring run only."""
    if config.compare.amortise == 1 or arm.baseline != "method" or not build_method(arm.of).collect_epochs:
        return ""
    return f" with a scoring run shared by {config.compare.amortise} trainings"


def _settled(config: Config, folder: Path) -> Config:
    """Return the config with the threads that the comparison began with: its runs must be comparable."""
    stored = folder / "threads.json"
    if config.scaling.threads != "auto" or not stored.exists():
        return config
    scaling = config.scaling.model_copy(update={"threads": json.loads(stored.read_text())})
    return config.model_copy(update={"scaling": scaling})


def _threads(config: Config, share: Share | None) -> int | str:
    if share is not None:
        return int(share.scaling["threads"])
    one_process = config.scaling.threads == "auto" and config.scaling.num_workers == 0
    return len(os.sched_getaffinity(0)) if one_process else config.scaling.threads


def _timing(arms: list[ArmRuns]) -> str:
    """Say whose seconds these are."""
    alone = [all(arm.runs[place].alone for arm in arms) for place in range(len(arms[0].runs))]
    if all(alone):
        return f"each run alone, nothing else of this comparison beside it; {_SECONDS}"
    if not any(alone):
        return f"runs that had others beside them, so they say little (compare.parallel=1); {_SECONDS}"
    seeds = ", ".join(str(run.seed) for run, timed in zip(arms[0].runs, alone, strict=True) if timed)
    return f"runs of seed {seeds} alone, the others side by side and not timed; {_SECONDS}"


def _validated_data(config: Config) -> tuple[Splits, float]:
    """Return the data, and how many points one validation sample is.

    Raises:
        ValueError: there is nothing to validate on.
    """
    data = config.data
    splits = open_data(data.source, limit=data.limit, cache=data.cache, **data.source_keys)
    if splits.validation is None:
        raise ValueError(f"data source {data.source} has no validation part, and accuracies are compared on it")
    return splits, 100.0 / len(splits.validation)


def _check_folder(folder: Path, config: Config) -> None:
    """Refuse a folder that another comparison, or a run, has made.

    Raises:
        ValueError: it is.
    """
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds a run, no comparison: choose another run.name")
    stored = folder / "compare.yaml"
    if not stored.exists():
        return
    try:
        before = make_config(read_yaml(stored.read_text()) or {})
    except ValueError as error:
        raise ValueError(f"{stored} can't be read ({error}): restore it or choose another run.name") from None
    if digest_of(before) != digest_of(config):
        raise ValueError(
            f"{folder} holds another comparison (of config {digest_of(before)}, this is {digest_of(config)}): "
            "choose another run.name, or leave it out"
        )


def _csv(arms: list[ArmRuns]) -> str:
    names = [field.name for field in dataclasses.fields(RunOutcome)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["arm", "baseline", *names])
    for arm in arms:
        writer.writerows([arm.name, arm.baseline, *(getattr(run, name) for name in names)] for run in arm.runs)
    return stream.getvalue()
