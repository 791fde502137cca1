"""The command `rayprune select`: select samples by their scores or an audit, into a file for `rayprune train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rayprune.cli.console import aligned, debug_option, say
from rayprune.core.validation import MAX_INT
from rayprune.errors import ConfigError
from rayprune.paths import as_path
from rayprune.report.text import share

if TYPE_CHECKING:
    import numpy as np

    from rayprune.core import Selection
    from rayprune.sources.tables.audits import AuditTable
    from rayprune.sources.tables.scores import ScoreFile

_MAX_CLASSES = 12  # to list one by one; of more, only those with the smallest and the largest share
_SHARE = click.FloatRange(min=0, max=1, max_open=True)


@click.command()
@click.argument("scores_path", metavar="SCORES")
@click.option("--by", metavar="NAME", help="The score to select by; not needed where there is only one.")
@click.option("--keep", metavar="SHARE|COUNT", help="0.3 keeps 30 %, rounded up; 1000 keeps 1000.  [required]")
@click.option(
    "--rule",
    default="top",
    show_default=True,
    type=click.Choice(["top", "bottom", "middle", "strata"]),
    help="The highest scores, the lowest, those around the median, or a draw that covers the whole range.",
)
@click.option(
    "--balance",
    default="none",
    show_default=True,
    type=click.Choice(["none", "proportional", "even"]),
    help="The same share of every class, or the same number.",
)
@click.option("--per-class", "balance", flag_value="proportional", help="The same as --balance proportional.")
@click.option(
    "--strata",
    "num_strata",
    default=50,
    show_default=True,
    type=click.IntRange(1, MAX_INT),
    metavar="N",
    help="Bins of the rule strata.",
)
@click.option(
    "--drop-bottom",
    default=0.0,
    type=_SHARE,
    metavar="SHARE",
    help="First drop this share of the samples, those with the lowest scores.",
)
@click.option(
    "--drop-top",
    default=0.0,
    type=_SHARE,
    metavar="SHARE",
    help="First drop this share of the samples, those with the highest scores.",
)
@click.option("--drop-missing", is_flag=True, help="Leave out samples without a score, such as never visited ones.")
@click.option("--reweigh", is_flag=True, help="Weigh the samples of a stratum by its size over the number drawn.")
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    metavar="N",
    help="Seed of the rule strata's draw.",
)
@click.option("--drop-suspects", is_flag=True, help="Of an audit: drop the samples whose label is probably wrong.")
@click.option(
    "--at",
    default=0.5,
    show_default=True,
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="PROBABILITY",
    help="Of --drop-suspects: drop from this probability of a wrong label on.",
)
@click.option("--drop-duplicates", is_flag=True, help="Of an audit: keep one sample of each group of duplicates.")
@click.option(
    "--out",
    multiple=True,
    metavar="PATH",
    help="File to write: .parquet or .txt; may be repeated. [default: chosen.parquet beside the scores]",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@debug_option
def select(
    scores_path: str,
    by: str | None,
    keep: str | None,
    out: tuple[str, ...],
    force: bool,
    drop_suspects: bool,
    at: float,
    drop_duplicates: bool,
    **options: Any,
) -> None:
    """Select samples by their SCORES: a scores.parquet, a run's folder, or a Parquet or CSV file with id and score.

    With --drop-suspects or --drop-duplicates, SCORES is the audit.parquet of rayprune audit, or its run's folder.

    Train on them with: rayprune train CONFIG method.name=fixed method.path=FILE
    """
    context = click.get_current_context()
    if drop_suspects or drop_duplicates:
        _check_audit_options(context, drop_suspects)
        _select_by_audit(scores_path, at if drop_suspects else None, drop_duplicates, out, force)
        return
    if context.get_parameter_source("at") == ParameterSource.COMMANDLINE:
        raise ConfigError("--at goes with --drop-suspects: add it, or leave --at out")
    if keep is None:
        raise click.MissingParameter(ctx=context, param=next(each for each in select.params if each.name == "keep"))
    from rayprune.sources.tables.scores import read_scores

    stored = read_scores(scores_path)
    name = stored.score_name(by)
    paths = _paths(out, stored.path, force)
    share_or_count = _share_or_count(keep)
    selection, num_missing = _select(stored, name, share_or_count, **options)
    about = {"scores": stored.path.name, "by": name, "keep": share_or_count, **options}
    about["method"] = stored.about.get("method")
    lines = _summary(stored, name, selection, num_missing, options)
    _write(paths, selection, stored.fingerprint, about, lines)


def _paths(out: Sequence[str], source: Path, force: bool, content: str = "scores") -> list[Path]:
    """Return the files to write, none of which may exist without --force."""
    from rayprune.sources.tables.selections import check_selection_path

    paths = [as_path(path) for path in out] or [source.with_name("chosen.parquet")]
    for path in paths:
        check_selection_path(path)
        if path.exists() and (not force or path.resolve() == source.resolve()):
            cure = "give another --out" + ("" if force else ", or --force to overwrite it")
            raise ConfigError(f"{path} exists{f' and holds the {content}' if force else ''}: {cure}")
    return paths


def _write(
    paths: Sequence[Path],
    selection: Selection,
    fingerprint: str | None,
    about: Mapping[str, Any],
    lines: Iterator[str],
) -> None:
    """Write the selection, and print its facts and the command that trains on it."""
    from rayprune.sources.tables.selections import write_selection_file

    for path in paths:
        write_selection_file(path, selection, fingerprint, about)
    for line in lines:
        say(line)
    for path in paths:
        say(f"wrote    {path}")
    say(f"train    rayprune train CONFIG method.name=fixed {shlex.quote(f'method.path={paths[0]}')}")


_OF_AUDITS = {"scores_path", "drop_suspects", "at", "drop_duplicates", "out", "force"}


def _check_audit_options(context: click.Context, drop_suspects: bool) -> None:
    """Refuse options that choose by scores, and --at without --drop-suspects."""
    given = [name for name in context.params if context.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if "at" in given and not drop_suspects:
        raise ConfigError("--at goes with --drop-suspects: add it, or leave --at out")
    if others := [name for name in given if name not in _OF_AUDITS]:
        option = next(each.opts[0] for each in context.command.params if each.name == others[0])
        flag = "--drop-suspects" if drop_suspects else "--drop-duplicates"
        raise ConfigError(f"{flag} chooses by the audit, and {option} by scores: leave one out")


def _select_by_audit(path: str, at: float | None, drop_duplicates: bool, out: Sequence[str], force: bool) -> None:
    """Keep the samples that an audit does not suspect."""
    from rayprune.core.selection import Selection
    from rayprune.sources.tables.audits import read_audit

    stored = read_audit(path)
    paths = _paths(out, stored.path, force, "audit")
    kept = stored.table.kept(at, drop_duplicates)
    if not kept.any():
        raise ConfigError(f"--at {at:g} drops every sample of {stored.path}: raise it")
    num_dropped = int(kept.size - kept.sum())
    selection = Selection.of_mask(kept, num_dropped / kept.size, num_dropped)
    about = {"audit": stored.path.name, "drop_suspects": at is not None, "at": at, "drop_duplicates": drop_duplicates}
    _write(paths, selection, stored.fingerprint, about, _audit_summary(stored.table, kept, at))


def _audit_summary(table: AuditTable, kept: np.ndarray, at: float | None) -> Iterator[str]:
    """Yield what was dropped and why, and the kept share of each class, a line each."""
    num_samples, num_kept = kept.size, int(kept.sum())
    num_suspects = num_samples - int(table.kept(at).sum())
    yield f"kept     {num_kept:,} of {num_samples:,} ({share(num_kept / num_samples, 1)})"
    reasons = [] if at is None else [f"{num_suspects:,} with p_wrong of at least {at:g}"]
    if repeated := num_samples - num_kept - num_suspects:
        reasons.append(f"{repeated:,} duplicates of kept samples")
    yield f"dropped  {num_samples - num_kept:,}: {', '.join(reasons) or 'no duplicates'}"
    yield from _dropped_lines(table.label, kept)


def _dropped_lines(labels: np.ndarray, kept: np.ndarray) -> Iterator[str]:
    """Yield the dropped share of each class; of many classes, only the extremes."""
    import numpy as np

    classes, inverse = np.unique(labels, return_inverse=True)
    sizes = np.bincount(inverse)
    dropped = np.bincount(inverse[~kept], minlength=classes.size)
    shares = dropped / sizes
    if classes.size > _MAX_CLASSES:
        yield _extremes(classes, shares)
        return
    rows = [("class", "dropped", "of", "share")]
    for label, count, size in zip(classes, dropped, sizes, strict=True):
        rows.append((str(label), f"{count:,}", f"{size:,}", share(count / size, 1)))
    for line in aligned(rows, words=()):
        yield f"{'':9}{line}"


def _share_or_count(text: str) -> float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise ConfigError(f"--keep {text!r} is not a number: give a share such as 0.3 or a count such as 1000")


def _select(
    stored: ScoreFile, name: str, keep: float, *, drop_missing: bool, seed: int, **rule: Any
) -> tuple[Selection, int]:
    """Return the selection, and the number of samples without a score, which are left out."""
    import numpy as np

    from rayprune.core.choosing import choose, num_kept
    from rayprune.core.selection import Selection

    if rule["balance"] != "none" and stored.labels is None:
        raise ConfigError(f"{stored.path} has no column 'label' of whole numbers: leave --balance out, or add one")
    count = num_kept(keep, stored.num_samples)
    scores = stored.scores[name]
    scored = np.flatnonzero(~np.isnan(scores))
    num_missing = stored.num_samples - scored.size
    if num_missing and not drop_missing:
        first = np.flatnonzero(np.isnan(scores))[:5].tolist()
        raise ConfigError(
            f"{num_missing} of {stored.num_samples} samples have no {name}, first ids {first}, perhaps never visited "
            "or not kept by the method: leave them out with --drop-missing"
        )
    if count > scored.size:
        raise ConfigError(f"--keep {keep} means {count} samples, but only {scored.size} have a {name}: keep fewer")
    labels = None if stored.labels is None else stored.labels[scored]
    within = choose(scores[scored], count, labels=labels, rng=np.random.default_rng([seed, 0]), **rule)
    weights = within.weights if rule["reweigh"] else None
    requested = 1.0 - count / stored.num_samples
    ids = scored[within.ids]
    return Selection.of_ids(ids, stored.num_samples, weights=weights, requested=requested), num_missing


def _summary(
    stored: ScoreFile, name: str, selection: Selection, num_missing: int, options: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a selection's facts, a line each."""
    import numpy as np

    scores, num_samples = stored.scores[name], stored.num_samples
    kept = scores[selection.ids]
    missing = f", {num_missing:,} left out without a {name}" if num_missing else ""
    yield f"kept     {selection.num_kept:,} of {num_samples:,} ({share(selection.num_kept / num_samples, 1)}){missing}"
    span = f"{np.nanmin(scores):.4g} to {np.nanmax(scores):.4g}"
    yield f"by       {name}, rule {options['rule']}: kept {kept.min():.4g} to {kept.max():.4g}, all {span}"
    if options["reweigh"]:
        weights = selection.weights
        yield f"weights  {weights.min():.4g} to {weights.max():.4g}, sum {weights.sum(dtype=np.float64):,.1f}"
    if stored.labels is not None:
        yield from _class_lines(stored.labels, selection.ids, kept)


def _class_lines(labels: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> Iterator[str]:
    """Yield the kept share of each class and the range of its scores; of many classes, only the extremes."""
    import numpy as np

    classes, inverse = np.unique(labels, return_inverse=True)
    sizes = np.bincount(inverse)
    kept = np.bincount(inverse[ids], minlength=classes.size)
    shares = kept / sizes
    if classes.size > _MAX_CLASSES:
        yield _extremes(classes, shares)
        return
    rows = [("class", "kept", "of", "share", "from", "to")]
    for index, label in enumerate(classes):
        own = scores[inverse[ids] == index]
        span = (f"{own.min():.4g}", f"{own.max():.4g}") if own.size else ("–", "–")
        rows.append((str(label), f"{kept[index]:,}", f"{sizes[index]:,}", share(shares[index], 1), *span))
    for line in aligned(rows, words=()):
        yield f"{'':9}{line}"


def _extremes(classes: np.ndarray, shares: np.ndarray) -> str:
    least, most = int(shares.argmin()), int(shares.argmax())
    return (
        f"classes  {classes.size}: from {share(shares[least], 1)} of class {classes[least]} "
        f"to {share(shares[most], 1)} of class {classes[most]}"
    )
