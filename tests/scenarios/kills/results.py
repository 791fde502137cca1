"""Outcomes of faults, their table, and the comparison of a faulty run with the reference run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from rayprune.engine.storage.run_folder import read_metrics
from tests.support.runs import RESULT_KEYS, scores_of, weights_of

from .faults import Fault
from .steps import Effect

_KEYS = (*RESULT_KEYS, "samples_padded", "val_loss")


@dataclass(frozen=True)
class Planned:
    """A planned fault: it strikes inside the step at the position."""

    fault: Fault
    position: tuple[int, int]


@dataclass
class Outcome:
    """The outcome of one fault.

    Attributes:
        planned: the fault.
        position: the step in progress.
        hit: what was hit.
        effect: repeated steps and seconds.
        num_commands: how often the command was run again, because the driver was killed or ended.
        lost: why the fault counts as lost; empty when it was survived.
        start, end: when it started and was over, on the clock of the step log.
        num_starts: how often the command had been run before.
    """

    planned: Planned
    position: tuple[int, int] = (-1, -1)
    hit: str = ""
    effect: Effect = field(default_factory=lambda: Effect(0, None))
    num_commands: int = 0
    lost: str = ""
    start: float = 0.0
    end: float = 0.0
    num_starts: int = 0


def differences(run: Path, reference: Path) -> list[str]:
    """Return the differences between two finished runs, in words; empty when they are equal bit for bit."""
    lines, expected_lines = read_metrics(run), read_metrics(reference)
    if len(lines) != len(expected_lines):
        return [f"{len(lines)} epochs instead of {len(expected_lines)}"]
    texts = [
        f"epoch {line['epoch']}: {key} {line[key]} instead of {expected[key]}"
        for line, expected in zip(lines, expected_lines, strict=True)
        for key in _KEYS
        if line[key] != expected[key]
    ]
    weights, expected_weights = weights_of(run), weights_of(reference)
    if weights.keys() != expected_weights.keys():
        texts.append("the last checkpoints hold different tensors")
    else:
        texts += [f"final {name} differs" for name in weights if not torch.equal(weights[name], expected_weights[name])]
    scores, expected_scores = scores_of(run), scores_of(reference)
    if list(scores) != list(expected_scores) or len(scores) != len(expected_scores):
        return [*texts, "scores.parquet has another shape"]
    counts = {name: int((scores[name].fillna(-1.0) != expected_scores[name].fillna(-1.0)).sum()) for name in scores}
    return texts + [f"scores.parquet: {name} differs for {num} samples" for name, num in counts.items() if num]


def line(outcome: Outcome) -> str:
    """Return one line on the outcome of a fault."""
    effect, (epoch, step) = outcome.effect, outcome.position
    recovery = f"next step after {effect.recovery_s:.1f} s" if effect.recovery_s is not None else "no step after"
    text = (
        f"{outcome.planned.fault.name:<17} epoch {epoch:>2} step {step:>2}: {recovery}, {effect.num_repeated} repeated"
    )
    text += f", {outcome.num_commands} new commands" if outcome.num_commands else ""
    return f"{text} ({outcome.hit or outcome.lost})" + (f" LOST: {outcome.lost}" if outcome.lost else "")


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the Markdown table of the outcomes by kind."""
    head = (
        "| kind | tried | survived | lost | command run again | repeated steps: median / max | "
        "seconds to the next step: median / max |"
    )
    names = sorted({outcome.planned.fault.name for outcome in outcomes})
    rows = [_row(name, [one for one in outcomes if one.planned.fault.name == name]) for name in names]
    return "\n".join([head, "|---|" + "---:|" * 6, *rows, _row("all", outcomes)])


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    num_lost = sum(bool(outcome.lost) for outcome in outcomes)
    repeated = [outcome.effect.num_repeated for outcome in outcomes]
    seconds = [outcome.effect.recovery_s for outcome in outcomes if outcome.effect.recovery_s is not None]
    cells = (
        name,
        len(outcomes),
        len(outcomes) - num_lost,
        num_lost,
        sum(outcome.num_commands > 0 for outcome in outcomes),
        f"{median(repeated):g} / {max(repeated)}" if repeated else "–",
        f"{median(seconds):.1f} / {max(seconds):.1f}" if seconds else "–",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
