"""The command `rayprune select`: scores into a file of chosen samples that `rayprune train` reads."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rayprune.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from rayprune.core import Selection
    from rayprune.sources.score_files import ScoreFile

_MOST_LISTED = 12  # classes; of more, only those with the smallest and the largest share are named

_SHARE = click.FloatRange(min=0, max=1, max_open=True)

_OPTIONS = (
    click.option("--by", metavar="NAME", help="The score to go by; may be left out where there is only one."),
    click.option("--keep", required=True, metavar="SHARE|COUNT", help="0.3 keeps 30 %, rounded up; 1000 keeps 1000."),
    click.option(
        "--rule",
        default="top",
        show_default=True,
        type=click.Choice(["top", "bottom", "middle", "strata"]),
        help="Highest scores, lowest, those about the median, or a draw that covers the whole range.",
    ),
    click.option(
        "--balance",
        default="none",
        show_default=True,
        type=click.Choice(["none", "proportional", "even"]),
        help="The same share of every class, or the same number.",
    ),
    click.option("--per-class", "balance", flag_value="proportional", help="The same as --balance proportional."),
    click.option(
        "--strata",
        "num_strata",
        default=50,
        show_default=True,
        type=click.IntRange(min=1),
        metavar="N",
        help="Bins of the rule strata.",
    ),
    click.option(
        "--drop-bottom", default=0.0, type=_SHARE, metavar="SHARE", help="First drop this share with the lowest scores."
    ),
    click.option(
        "--drop-top", default=0.0, type=_SHARE, metavar="SHARE", help="First drop this share with the highest scores."
    ),
    click.option("--drop-missing", is_flag=True, help="Leave out samples without a score, such as never visited ones."),
    click.option("--reweigh", is_flag=True, help="Weigh the samples of a stratum by its size over the number drawn."),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        metavar="N",
        help="Seed of the rule strata's draw.",
    ),
    click.option(
        "--out",
        multiple=True,
        metavar="PATH",
        help="File to write: .parquet or .txt; may be repeated. [default: chosen.parquet beside the scores]",
    ),
    click.option("--force", is_flag=True, help="Overwrite files that exist."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
)


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("scores_path", metavar="SCORES")
@_with_options
def select(scores_path: str, by: str | None, keep: str, out: tuple[str, ...], force: bool, **how: Any) -> None:
    """Choose samples by their SCORES: a scores.parquet, a run's folder, or a Parquet or CSV file with id and score.

    Training on them: rayprune train CONFIG method.name=fixed method.path=FILE
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
    selection, num_missing = _chosen(stored, name, share_or_count, **how)
    about = {
        "scores": stored.path.name,
        "by": name,
        "keep": share_or_count,
        **how,
        "method": stored.about.get("method"),
    }
    for path in paths:
        write_selection_file(path, selection, stored.fingerprint, about)
    for line in _summary(stored, name, selection, num_missing, how):
        click.echo(line)
    for path in paths:
        click.echo(f"wrote    {path}")
    click.echo(f"train    rayprune train CONFIG method.name=fixed {shlex.quote(f'method.path={paths[0]}')}")


def _share_or_count(text: str) -> float:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise ConfigError(f"--keep {text!r} is no number: give a share such as 0.3 or a number of samples such as 1000")


def _chosen(
    stored: ScoreFile,
    name: str,
    keep: float,
    rule: Any,
    balance: Any,
    num_strata: int,
    drop_bottom: float,
    drop_top: float,
    drop_missing: bool,
    reweigh: bool,
    seed: int,
) -> tuple[Selection, int]:
    """Return what was chosen among all samples, and how many were left out for want of a score."""
    import numpy as np

    from rayprune.core.choosing import choose, num_kept
    from rayprune.core.selection import Selection

    if balance != "none" and stored.labels is None:
        raise ConfigError(f"{stored.path} has no column 'label' of whole numbers: leave --balance out, or add one")
    count = num_kept(keep, stored.num_samples)
    scores = stored.scores[name]
    present = np.flatnonzero(~np.isnan(scores))
    num_missing = stored.num_samples - present.size
    if num_missing and not drop_missing:
        first = np.flatnonzero(np.isnan(scores))[:5].tolist()
        raise ConfigError(
            f"{num_missing} of {stored.num_samples} samples have no {name}, first ids {first}, as never visited: "
            "--drop-missing leaves them out of the choice"
        )
    if count > present.size:
        raise ConfigError(f"--keep {keep} asks for {count} samples, and {present.size} have a {name}: keep fewer")
    within = choose(
        scores[present],
        count,
        rule,
        labels=None if stored.labels is None else stored.labels[present],
        balance=balance,
        rng=np.random.default_rng([seed, 0]),
        num_strata=num_strata,
        drop_bottom=drop_bottom,
        drop_top=drop_top,
        reweigh=reweigh,
    )
    weights = within.weights if reweigh else None
    requested = 1.0 - count / stored.num_samples
    ids = present[within.ids]
    return Selection.of_ids(ids, stored.num_samples, weights=weights, requested=requested), num_missing


def _summary(
    stored: ScoreFile, name: str, selection: Selection, num_missing: int, how: dict[str, Any]
) -> Iterator[str]:
    """Yield what a person wants to know of a choice, a line each."""
    import numpy as np

    scores, num_samples = stored.scores[name], stored.num_samples
    kept = scores[selection.ids]
    missing = f", {num_missing:,} left out without a {name}" if num_missing else ""
    yield f"kept     {selection.num_kept:,} of {num_samples:,} ({selection.num_kept / num_samples:.1%}){missing}"
    span = f"{np.nanmin(scores):.4g} to {np.nanmax(scores):.4g}"
    yield f"by       {name}, rule {how['rule']}: kept {kept.min():.4g} to {kept.max():.4g}, all {span}"
    if how["reweigh"]:
        weights = selection.weights
        yield f"weights  {weights.min():.4g} to {weights.max():.4g}, together {weights.sum(dtype=np.float64):,.1f}"
    if stored.labels is not None:
        yield from _class_lines(stored.labels, selection.ids, kept)


def _class_lines(labels: np.ndarray, ids: np.ndarray, scores: np.ndarray) -> Iterator[str]:
    """Yield what is kept of each class and from which to which score; of many classes only the extremes."""
    import numpy as np

    classes, inverse = np.unique(labels, return_inverse=True)
    sizes = np.bincount(inverse)
    kept = np.bincount(inverse[ids], minlength=classes.size)
    shares = kept / sizes
    if classes.size > _MOST_LISTED:
        least, most = int(shares.argmin()), int(shares.argmax())
        yield (
            f"classes  {classes.size}: from {shares[least]:.1%} of class {classes[least]} "
            f"to {shares[most]:.1%} of class {classes[most]}"
        )
        return
    cells = [("class", "kept", "of", "share", "from", "to")]
    for number, label in enumerate(classes):
        own = scores[inverse[ids] == number]
        span = (f"{own.min():.4g}", f"{own.max():.4g}") if own.size else ("–", "–")
        cells.append((str(label), f"{kept[number]:,}", f"{sizes[number]:,}", f"{shares[number]:.1%}", *span))
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        yield " " * 9 + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
