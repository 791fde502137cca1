"""The command `rayprune select`: select samples by their scores, into a file for `rayprune train`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprune.cli.console import aligned, debug_option, say
from rayprune.errors import ConfigError
from rayprune.report.text import share

if TYPE_CHECKING:
    import numpy as np

    from rayprune.core import Selection
    from rayprune.sources.score_files import ScoreFile

_MAX_CLASSES = 12  # to list one by one; of more, only those with the smallest and the largest share
_SHARE = click.FloatRange(min=0, max=1, max_open=True)


@click.command()
@click.argument("scores_path", metavar="SCORES")
@click.option("--by", metavar="NAME", help="The score to select by; not needed where there is only one.")
@click.option("--keep", required=True, metavar="SHARE|COUNT", help="0.3 keeps 30 %, rounded up; 1000 keeps 1000.")
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
    type=click.IntRange(min=1),
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
@click.option(
    "--out",
    multiple=True,
    metavar="PATH",
    help="File to write: .parquet or .txt; may be repeated. [default: chosen.parquet beside the scores]",
)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@debug_option
def select(scores_path: str, by: str | None, keep: str, out: tuple[str, ...], force: bool, **options: Any) -> None:
    """Select samples by their SCORES: a scores.parquet, a run's folder, or a Parquet or CSV file with id and score.

    Train on them with: rayprune train CONFIG method.name=fixed method.path=FILE
    """
    from rayprune.sources.score_files import read_scores
    from rayprune.sources.selection_files import check_selection_path, write_selection_file

    stored = read_scores(scores_path)
    name = stored.score_name(by)
    paths = [Path(path) for path in out] or [stored.path.with_name("chosen.parquet")]
    for path in paths:
        check_selection_path(path)
        if path.exists() and (not force or path.samefile(stored.path)):
            cure = "give another --out" + ("" if force else ", or --force to overwrite it")
            raise ConfigError(f"{path} exists{' and holds the scores' if force else ''}: {cure}")
    share_or_count = _share_or_count(keep)
    selection, num_missing = _select(stored, name, share_or_count, **options)
    about = {"scores": stored.path.name, "by": name, "keep": share_or_count, **options}
    about["method"] = stored.about.get("method")
    for path in paths:
        write_selection_file(path, selection, stored.fingerprint, about)
    for line in _summary(stored, name, selection, num_missing, options):
        say(line)
    for path in paths:
        say(f"wrote    {path}")
    say(f"train    rayprune train CONFIG method.name=fixed {shlex.quote(f'method.path={paths[0]}')}")


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
        least, most = int(shares.argmin()), int(shares.argmax())
        yield (
            f"classes  {classes.size}: from {share(shares[least], 1)} of class {classes[least]} "
            f"to {share(shares[most], 1)} of class {classes[most]}"
        )
        return
    rows = [("class", "kept", "of", "share", "from", "to")]
    for index, label in enumerate(classes):
        own = scores[inverse[ids] == index]
        span = (f"{own.min():.4g}", f"{own.max():.4g}") if own.size else ("–", "–")
        rows.append((str(label), f"{kept[index]:,}", f"{sizes[index]:,}", share(shares[index], 1), *span))
    for line in aligned(rows, words=()):
        yield f"{'':9}{line}"
