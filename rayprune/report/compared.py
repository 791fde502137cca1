"""What a comparison says: its table of arms, what its columns mean, its verdicts. Out of compare.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rayprune.report.cells import number, share

HEADS = ("arm", "accuracy", "to full", "worst class", "epochs", "samples", "compute", "FLOPs", "time", "seconds")


def compare_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row an arm, as many cells as HEADS."""
    return [_row(arm, report) for arm in report["arms"]]


def _row(arm: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[str, ...]:
    spread = "" if arm["accuracy_sd"] is None else f" ± {arm['accuracy_sd']:.2f}"
    whole, compute = report["arms"][0]["compute"], arm["compute"]
    return (
        arm["name"],
        f"{arm['accuracy']:.2f}{spread}",
        "" if arm["baseline"] == "full" else _difference(arm["to_full"]),
        number(arm["worst_class"], ".2f"),
        "–".join(str(epochs) for epochs in (arm["epochs"][0], arm["epochs"][-1])[: len(arm["epochs"])]),
        number(arm["samples_trained"], ",.0f"),
        share(compute / whole if whole and compute is not None else None, 1),
        number(arm["flops"], ".2e"),
        share(arm["seconds_to_full"]["mean"], 1),
        number(arm["seconds"], ".1f"),
    )


def _difference(found: Mapping[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return f"{found['mean']:+.2f}"
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def explanation(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the columns mean, and what the derived arms were matched to."""
    num = len(report["seeds"])
    interval = f"; [{report['confidence']:.0%} interval of paired seeds]" if num > 1 else ""
    yield f"points of accuracy after the last epoch, mean{' ± sd' * (num > 1)} of {num} seed{'s' * (num > 1)}{interval}"
    yield f"seconds: {report['timing']}; time: their share of full training's, geometric mean over pairs"
    if uneven := report["uneven_seconds"]:
        yield (
            f"an epoch on everything took {uneven[0]:.3g} to {uneven[1]:.3g} s: runs this short vary, or something "
            "else ran on this machine; seconds say little"
        )
    for arm in report["arms"]:
        if arm["matched"]:
            each = " (first seed)" if num > 1 and arm["baseline"].startswith("random") else ""
            yield f"{arm['name']} matches {arm['matched']}{each}"


def verdict_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence a method, and the one on all of them last."""
    if len(report["methods"]) > 1:
        for judged in report["methods"].values():
            yield f"{judged['sentence']}: {judged['outcome']}."
    yield report["verdict"]["sentence"]
