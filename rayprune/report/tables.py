"""Tables and sentences on runs, comparisons and sweeps, the same on the page and in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayprune.config.experiments import format_value
from rayprune.core.references import closest
from rayprune.errors import ConfigError, RunFolderError
from rayprune.report.differences import from_defaults
from rayprune.report.read import Comparison, Difference, RunRecord, SelfCheck, as_mapping
from rayprune.report.text import count_of, number, percent, share, training_seconds

Row = Mapping[str, Any]
_SELECTION = ("select", "record", "forward_only")  # the parts of an epoch's seconds that only a selection needs


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        head: names of the columns.
        rows: a cell for each column.
        words: indices of the columns of words, which are aligned to the left.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: Collection[int] = (0,)


def runs_table(runs: Sequence[RunRecord]) -> Table:
    """Return a table with the result of each run, what it saved, and what selection cost."""
    head = ("run", "method", "val acc", "samples trained", "saved", "compute", "train s", "selection s", "wall s")
    rows = []
    for run in runs:
        last = run.metrics[-1]
        rows.append(
            (
                run.name,
                str(run.setting("method", "name")),
                share(last.val_accuracy),
                number(last.samples_trained, ",d"),
                share(run.saved, 1),
                share(run.compute_share, 1),
                number(run.training_seconds, ".1f"),
                number(run.seconds(*_SELECTION), ".2f"),
                number(last.wall_time, ".1f"),
            )
        )
    return Table(head, rows, words=(0, 1))


RUNS_NOTE = (
    "saved and compute: against training on all samples in the same epochs. train s: training seconds, with selection "
    "and checkpoints, without validation. selection s: the part of them that selecting, recording and forward-only "
    "passes took. wall s: everything from the start of the workers on; the start of Ray comes before."
)


def above_full(runs: Sequence[RunRecord]) -> list[str]:
    """Return a sentence for each run whose compute is above that of training on all samples: what adds to it."""
    lines = []
    for run in runs:
        if run.compute_share is None or run.compute_share <= 1.0:
            continue
        last, step = run.metrics[-1], as_mapping(run.setting("train", "step")).get("name", "plain")
        causes = [
            f"{last.samples_padded:,} rows of padding fill the last batch of each epoch" if last.samples_padded else "",
            f"{last.samples_forwarded:,} samples of forward-only passes count a third"
            if last.samples_forwarded
            else "",
            f"{last.samples_meta:,} samples of meta batches" if last.samples_meta else "",
            f"the scoring run trained on {last.samples_collected:,} samples" if last.samples_collected else "",
            "" if step == "plain" else f"a train step {step} costs more than a plain one",
        ]
        reasons = "; ".join(cause for cause in causes if cause) or "see compute in metrics.jsonl"
        lines.append(f"{run.name}, compute above 100%: {reasons}")
    return lines


def headline(run: RunRecord) -> list[str]:
    """Return what a single run saved, what that cost, and against what, a sentence each."""
    method, last = str(run.setting("method", "name")), run.metrics[-1]
    epochs = count_of(last.epoch + 1, "epoch")
    reached = f"Validation accuracy {share(last.val_accuracy)} after epoch {last.epoch + 1}"
    if method == "full":
        cure = "train the loop with another method" if run.is_own_loop else "rayprune compare"
        return [f"{run.progress.capitalize()} on all samples.", f"{reached}. What pruning would save: {cure}."]
    lines = []
    if run.saved is not None:
        amount = f"{share(abs(run.saved), 1)} {'more than' if run.saved < 0 else 'of'}"
        verb = "took" if run.saved < 0 else "saved"
        so_far = "" if run.finished else ", so far"
        lines.append(f"{method} {verb} {amount} the sample visits of full training over the same {epochs}{so_far}.")
    if last.samples_skipped:
        lines.append(
            f"It skipped {last.samples_skipped:,} rows inside batches. {number(last.samples_forwarded, ',d')} rows had "
            "a forward pass alone, each a third of a trained one in compute; its time is in the train s."
        )
    lines.append(
        f"Compute, padding included: {share(run.compute_share, 1)} of training on all samples. Selection took "
        f"{number(run.seconds(*_SELECTION), '.2f')} of {number(run.training_seconds, '.1f')} train s."
    )
    cure = "train the loop with rayprune.Full(), too" if run.is_own_loop else "rayprune compare trains both"
    lines.append(f"{reached}. Only a run on all samples shows what pruning did to it: {cure}.")
    return lines


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return a run's settings and state as (name, value)."""
    environment, last = run.environment, run.metrics[-1]
    versions = as_mapping(environment.get("versions"))
    options = {key: value for key, value in as_mapping(run.config.get("method")).items() if key != "name"}
    method = str(run.setting("method", "name"))
    pairs = [
        ("folder", str(run.folder)),
        ("state", f"finished, {run.progress}" if run.finished else run.progress),
        ("data", f"{run.setting('data', 'source')}, {number(last.num_samples, ',d')} samples"),
        ("model", str(run.setting("model", "name"))),
        ("method", f"{method} ({_listed(options)})" if options else method),
        ("not default", from_defaults(run)),
        ("batch size", str(run.setting("train", "batch_size"))),
        ("seed", str(run.setting("train", "seed"))),
        ("workers", f"{number(last.world_size, 'd')}, stream {environment.get('stream', '–')}"),
        ("device", str(environment.get("gpu") or "CPU")),
        (
            "versions",
            ", ".join(f"{name} {versions[name]}" for name in ("rayprune", "torch", "ray") if name in versions),
        ),
    ]
    if last.samples_forwarded:
        pairs.append(("rows", f"{number(last.samples_trained, ',d')} trained on, {last.samples_forwarded:,} forwarded"))
    if budget := last.selection.budget_so_far:
        skipped = (last.samples_skipped or 0) / ((last.num_samples or 0) * run.num_epochs or 1)
        pairs.append(("kept so far", f"{share(budget - skipped, 1)} of the sample visits of a full run"))
    return pairs


def _listed(settings: Mapping[str, Any]) -> str:
    """Return the settings that are set, in one line."""
    return ", ".join(
        f"{key} ({_listed(value)})" if isinstance(value, Mapping) else f"{key} {value}"
        for key, value in settings.items()
        if value not in (None, [], {}, "")
    )


def epochs_table(run: RunRecord) -> Table:
    """Return a table of a run's epochs."""
    head = ("epoch", "requested", "pruned", "train loss", "train acc", "val loss", "val acc", "lr", "train s")
    rows = [
        (
            str(line.epoch + 1),
            share(line.requested_prune_ratio, 1),
            share(line.pruned_fraction, 1),
            number(line.train_loss),
            share(line.train_accuracy),
            number(line.val_loss),
            share(line.val_accuracy),
            number(line.lr, ".2e"),
            number(training_seconds(line.seconds) if line.seconds.get("epoch") else None, ".2f"),
        )
        for line in run.metrics
    ]
    return Table(head, rows, words=())


def samples_table(run: RunRecord, sort: str | None = None, top: int = 20, ascending: bool = False) -> Table:
    """Return the samples with the highest scores.

    Args:
        run: with scores.
        sort: column to sort by: a score, `times_pruned`, `last_visit` or `id`; default: the first score.
        top: number of samples.
        ascending: return the lowest instead.

    Raises:
        RunFolderError: the run has no scores.
        ConfigError: it has none of this name.
    """
    if run.scores is None:
        raise RunFolderError(f"{run.folder} has no scores.parquet: {run.scores_cure}")
    columns: dict[str, Any] = {"id": run.scores.ids, **run.scores.scores}
    names = list(run.scores.scores)
    sort = names[0] if sort is None else sort
    if sort not in columns:
        raise ConfigError(f"{run.scores.path} has no column {sort!r}: {closest(sort, columns)}")
    values = np.asarray(columns[sort], dtype=np.int64 if sort == "id" else np.float64)
    # Samples with equal scores stay in the order of their ids; those without a score come last.
    order = np.argsort(values if ascending else -values, kind="stable")[:top]
    labels = run.scores.labels
    rows = []
    for sample in order.tolist():
        cells = [number(float(columns[name][sample]), ".6g") for name in names]
        rows.append((str(sample), "–" if labels is None else str(labels[sample]), *cells))
    return Table(("id", "label", *names), rows, words=())


def arms_table(comparison: Comparison) -> Table:
    """Return a table of the arms of a comparison."""
    head: tuple[str, ...] = ("arm", "accuracy", "minus full", "worst class", "epochs", "lr", "step", "samples")
    head += ("compute", "FLOPs", "time", "train s")
    full = comparison.arms[0]
    rows = [
        (
            arm.name,
            f"{arm.accuracy:.2f}" + ("" if arm.accuracy_sd is None else f" ± {arm.accuracy_sd:.2f}"),
            "" if arm is full else _interval(arm.to_full),
            number(arm.worst_class, ".2f"),
            "–".join(str(epochs) for epochs in sorted({arm.epochs[0], arm.epochs[-1]})),
            number(arm.learning_rate, ".3g"),
            number(arm.mean_step_scale, ".2f"),
            number(arm.samples_trained, ",.0f"),
            share(1 - arm.compute_saved, 1),
            number(arm.flops, ".2e"),
            share(arm.seconds_to_full.mean, 1),
            number(arm.seconds, ".1f"),
        )
        for arm in comparison.arms
    ]
    return Table(head, rows)


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+z.2f}"
    return f"{difference.mean:+z.2f} [{difference.low:+z.2f}, {difference.high:+z.2f}]"


def explanation(comparison: Comparison) -> Iterator[str]:
    """Yield the meaning of the columns of a comparison's table, and what the derived arms were matched to."""
    num = len(comparison.seeds)
    interval = f"[{percent(comparison.confidence)} interval over seeds and validation samples]"
    yield f"accuracy: points after the last epoch, {f'mean ± sd of {num} seeds; {interval}' if num > 1 else '1 seed'}"
    for arm in comparison.arms:
        if arm.baseline == "method" and arm.sample_share is not None and num > 2:
            yield (
                f"{arm.name} minus full: {share(arm.sample_share, 0)} of the variance is due to the validation "
                "samples; more seeds do not reduce it"
            )
    yield f"train s: {comparison.timing}; time: ratio to full training's train s, geometric mean over pairs"
    if uneven := comparison.uneven_seconds:
        yield (
            f"an epoch on all samples took {uneven[0]:.3g} to {uneven[1]:.3g} s: such short runs vary, or something "
            "else ran on this machine; do not rely on the seconds"
        )
    yield "lr: peak learning rate; step: mean size of a step, relative to full training at optim.lr"
    full = comparison.arms[0].mean_step_scale
    if other := [arm.name for arm in comparison.arms if abs(arm.mean_step_scale / full - 1.0) > 0.05]:
        yield f"mean steps that differ from full training's by more than 5%: {', '.join(other)}"
    for check in comparison.self_checks:
        yield _self_check(comparison, check)
    for arm in comparison.arms:
        if arm.matched:
            first = " (first seed)" if num > 1 and arm.baseline.startswith("random") else ""
            yield f"{arm.name} matches {arm.matched}{first}"


def _self_check(comparison: Comparison, check: SelfCheck) -> str:
    """Return a sentence on two arms that should agree."""
    line = f"self-check: {' − '.join(check.arms)} is {_interval(check.difference)}; the same training but for the order"
    if check.agrees is not False:
        return line
    rates = [arm.learning_rate for arm in comparison.arms if arm.name in check.arms]
    cure = "look for a mistake before you trust the rest"
    if max(rates) > 1.05 * min(rates):
        cure = "their learning rates differ, so tune with more seeds (compare.tune_seeds)"
    return f"{line}, so they should agree: {cure}"


def verdict_lines(comparison: Comparison) -> Iterator[str]:
    """Yield a sentence on each method if there are several, and then the one on all of them."""
    if len(comparison.methods) > 1:
        for verdict in comparison.methods.values():
            yield f"{verdict.sentence}: {verdict.outcome}."
    yield comparison.verdict.sentence


def trials_table(rows: Sequence[Row], keys: Sequence[str]) -> Table:
    """Return a table of the trials of a sweep, most accurate first, with a star for those on the Pareto front.

    Args:
        rows: as in results.parquet, None if a value is missing.
        keys: the swept keys.
    """
    head = ("", *keys, "val acc", "compute", "FLOPs", "samples trained", "epochs", "wall s", "status", "trial")
    cells = [
        (
            "*" if row["pareto"] else "",
            *("–" if row[key] is None else format_value(row[key]) for key in keys),
            share(row["val_accuracy"]),
            share(row["compute_share"]),
            number(row["flops"], ".2e"),
            number(row["samples_trained"], ",.0f"),
            number(row["epochs"], ".0f"),
            number(row["seconds"], ".1f"),
            row["status"],
            row["trial"],
        )
        for row in by_accuracy(rows)
    ]
    return Table(head, cells, words=(*range(1 + len(keys)), len(head) - 2, len(head) - 1))


def by_accuracy(rows: Sequence[Row]) -> list[Row]:
    """Return the trials, most accurate first, and those without an accuracy last."""
    return sorted(rows, key=lambda row: (row["val_accuracy"] is None, -(row["val_accuracy"] or 0.0)))


def sweep_lines(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """Return the results of a sweep in sentences."""
    counts = ", ".join(f"{num} {status}" for status, num in Counter(row["status"] for row in rows).most_common())
    front = [row for row in rows if row["pareto"]]
    lines = [f"{count_of(len(rows), 'trial')}: {counts}. On the Pareto front of accuracy and compute: {len(front)}."]
    if front:
        best = by_accuracy(front)[0]
        point = ", ".join(f"{key} {best[key]}" for key in keys)
        lines.append(
            f"Most accurate: {share(best['val_accuracy'])} with {point}, for {share(best['compute_share'], 1)} of the "
            "compute of a full run of the same length."
        )
    return lines


def sweep_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the meaning of the columns of a sweep's table."""
    yield "*: on the Pareto front of accuracy and FLOPs. All figures are those of the last epoch, not of the best."
    if any((row["compute_share"] or 0.0) > 1.0 for row in rows):
        yield (
            "compute above 100% of N samples in every epoch: rows of padding fill the last batch of each epoch; "
            "forward-only passes and train steps other than plain add to it"
        )
