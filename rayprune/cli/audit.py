"""The command `rayprune audit`: find wrong labels, near-duplicates and outliers in the training data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprune.cli.console import debug, debug_option, elapsed, say, say_table, single_config, trust_option, warn
from rayprune.cli.train import RunDisplay
from rayprune.paths import as_path
from rayprune.report.text import share

if TYPE_CHECKING:
    from rayprune.experiments.audit.runner import Audit

_GROUPS = {
    "wrong_label": "labels that are probably wrong",
    "leak": "near-duplicates of validation samples",
    "duplicate": "near-duplicates of other training samples",
    "outlier": "outliers",
    "never_learned": "samples that were never predicted correctly",
    "easy": "trivially easy samples, always predicted correctly",
}
_MAX_PAIRS = 5


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG|RUN [key=value]...")
@trust_option
@debug_option
def audit(arguments: tuple[str, ...], trust: bool | str) -> None:
    """Find what is wrong with the training data of CONFIG: labels, near-duplicates, leaks, outliers.

    Trains audit.folds networks, each on all samples but one part, and predicts that part. Writes audit.parquet, a row
    per sample, and audit.json. Run the same command again to continue where it stopped.

    With RUN, the folder of a finished run, nothing is trained: its network predicts the samples that it has trained on.
    """
    start = time.perf_counter()
    from rayprune.config.shipped import find_config

    path, overrides = single_config(arguments, "rayprune audit digits_full")
    folder = as_path(path)
    is_run = folder.is_dir() and ((folder / "config.yaml").exists() or not find_config(path).is_file())
    result = _audit_run(folder, overrides, trust) if is_run else _audit_config(path, overrides)
    _say_findings(result)
    from rayprune.report.audit import TRAINED, WEAK

    if result.summary["is_weak"]:
        warn(f"\n{WEAK}")
    if result.summary["predictions"] == "trained_network":
        warn(f"\n{TRAINED}")
    say(f"\ndone in {elapsed(start)}: {result.folder}")


def _audit_config(path: str, overrides: list[str]) -> Audit:
    from rayprune.config import read_config

    config = read_config(path, overrides)
    from rayprune.experiments.audit.runner import audit as run
    from rayprune.experiments.audit.runner import digest_of

    if config.run.name is None:
        named = config.run.model_copy(update={"name": f"{Path(path).stem}-audit-{digest_of(config)}"})
        config = config.model_copy(update={"run": named})
    with RunDisplay() as display:
        return run(config, debug=debug(), **display.listeners)


def _audit_run(folder: Path, overrides: list[str], trust: bool | str) -> Audit:
    from rayprune.experiments.audit.of_run import audit_run, run_config

    config = run_config(folder, overrides, trust)
    with RunDisplay() as display:
        return audit_run(config, debug=debug(), **display.listeners)


def _say_findings(result: Audit) -> None:
    summary, file = result.summary, result.folder / "audit.parquet"
    num, names = summary["num_samples"], summary["class_names"]

    def named(label: int) -> str:
        return str(names[label]) if label < len(names) else str(label)

    say()
    say(f"{share(summary['noise_rate'], 1)} of {num:,} labels are wrong, by estimate")
    if summary["predictions"] == "out_of_fold":
        say(f"{share(summary['accuracy'], 1)} of the labels are predicted by networks that did not train on the sample")
    if pairs := [pair for pair in summary["pairs"] if pair["count"]][:_MAX_PAIRS]:
        rows: list[tuple[Any, ...]] = [("label", "likely", "suspects", "share of the label")]
        rows += [
            (named(pair["label"]), named(pair["suggested"]), f"{pair['count']:,}", share(pair["rate"], 1))
            for pair in pairs
        ]
        say_table(rows, words=(0, 1))
    say()
    say_table(
        [("samples", ""), *((f"{summary['groups'].get(name, 0):,}", text) for name, text in _GROUPS.items())], (1,)
    )
    if conflicts := summary["conflicts"]:
        say(f"{conflicts:,} of the near-duplicates have another label than the first sample of their group")
    say()
    say(f"look at them    rayprune report {result.folder}")
    say(f"leave them out  rayprune select {file} --drop-suspects")
    say(f"correct them    rayprune train CONFIG data.relabel={file}")
