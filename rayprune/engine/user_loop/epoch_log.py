"""An epoch's line in the run folder of a loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rayprune.engine.scoring.messages import EpochSnapshot, PlanHeader
from rayprune.errors import ConfigError

_FRACTIONS = ("val_accuracy", "train_accuracy")
# Besides the facts of the plan, what rayprune writes itself.
_OWN = frozenset({"samples_trained", "samples_padded", "samples_forwarded", "compute", "world_size", "wall_time"})
_MEASURED = frozenset({"seconds", "selection", "score_quantiles", "nonfinite_losses", "train_loss"})


class EpochLog:
    """Collects the numbers of an epoch.

    Args:
        header: of the epoch's plan.

    Attributes:
        metrics: the user's.
        forward_only_s: seconds of the forward-only pass.
    """

    def __init__(self, header: PlanHeader) -> None:
        self._header, self._started = header, time.perf_counter()
        self._plan = {
            "epoch": header.plan_pass.key.epoch,
            "requested_prune_ratio": header.requested,
            "pruned_fraction": header.realised,
            "kept": header.num_kept,
            "mean_weight": header.mean_weight,
            "lr_scale": header.lr_scale,
            "num_samples": header.num_samples,
            "plan_hash": header.hash,
        }
        self.metrics: dict[str, Any] = {}
        self.forward_only_s = 0.0

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add the user's metrics; see `Epoch.log`."""
        if taken := metrics.keys() & (self._plan.keys() | _OWN | _MEASURED):
            raise ConfigError(f"rayprune writes {', '.join(sorted(taken))} itself: log it under another name")
        for name, value in metrics.items():
            number = value.item() if getattr(value, "size", None) == 1 or hasattr(value, "numel") else value
            if not isinstance(number, int | float | str | None):
                raise ConfigError(f"log got {name} of type {type(value).__name__}: give a number or text")
            if name in _FRACTIONS and isinstance(number, int | float) and not 0 <= number <= 1:
                raise ConfigError(f"log got {name} {number:g}: give a fraction in [0, 1]")
            self.metrics[name] = number

    def line(self, snapshot: EpochSnapshot, step: int, num_forwarded: int, world_size: int) -> dict[str, Any]:
        """Return the line, with the counts and seconds of this epoch alone.

        Args:
            snapshot: of the epoch's end.
            step: batches taken.
            num_forwarded: samples of the forward-only pass.
            world_size: the number of ranks.
        """
        rows, seconds = step * self._header.batch_rows * world_size, time.perf_counter() - self._started
        trained = min(rows, self._header.num_rows)
        return {
            **self._plan,
            "samples_trained": trained,
            "samples_padded": rows - trained,
            "samples_forwarded": num_forwarded,
            "compute": round(rows + num_forwarded / 3, 1),
            "world_size": world_size,
            "wall_time": seconds,
            "seconds": {"epoch": seconds, "select": snapshot.select_s, "forward_only": self.forward_only_s},
            "selection": dict(self._header.facts),
            "score_quantiles": dict(snapshot.score_quantiles),
            "nonfinite_losses": snapshot.num_nonfinite,
            **self.metrics,
        }
