"""Lines and the table of a torture."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .campaign import Outcome


def line(outcome: Outcome) -> str:
    """Say in one line what became of a disturbance."""
    effect, (epoch, step) = outcome.effect, outcome.at
    back = f"next step after {effect.back_s:.1f} s" if effect.back_s is not None else "no step after"
    text = f"{outcome.planned.kind.name:<17} epoch {epoch:>2} step {step:>2}: {back}, {effect.redone} steps again"
    text += f", command again {outcome.commands}×" if outcome.commands else ""
    return f"{text} ({outcome.hit or outcome.lost})" + (f" LOST: {outcome.lost}" if outcome.lost else "")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table by kind, in Markdown."""
    head = (
        "| kind | tried | survived | lost | by the same command again | steps done again: median / max | "
        "seconds to the next step: median / max |"
    )
    names = list(dict.fromkeys(outcome.planned.kind.name for outcome in outcomes))
    rows = [_row(name, [o for o in outcomes if o.planned.kind.name == name]) for name in sorted(names)]
    return "\n".join([head, "|---|" + "---:|" * 6, *rows, _row("all", outcomes)])


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    lost = sum(bool(outcome.lost) for outcome in outcomes)
    redone = [outcome.effect.redone for outcome in outcomes]
    seconds = [outcome.effect.back_s for outcome in outcomes if outcome.effect.back_s is not None]
    back = f"{median(seconds):.1f} / {max(seconds):.1f}" if seconds else "–"
    again = sum(outcome.commands > 0 for outcome in outcomes)
    cells = (
        name,
        len(outcomes),
        len(outcomes) - lost,
        lost,
        again,
        f"{median(redone):g} / {max(redone)}" if redone else "–",
        back,
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
