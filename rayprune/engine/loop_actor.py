"""The ScoreActor of a training loop that is the user's own: its state travels in the user's checkpoints.

There is no run folder. A restarted actor begins epoch 0 again, and the workers push what it misses; in a later epoch
what it held is lost, the attempt ends, and the loop goes back to its own last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayprune.core.selector import Selector
from rayprune.engine.actor import ScoreActor
from rayprune.engine.protocol import ObservationsLost
from rayprune.methods import build_method
from rayprune.sources.base import shuffle_name

# What a filtered stream keeps: a key, codes (N,) (0 = left out), the weight of each code from 1 on.
Wanted = tuple[tuple[Any, ...], NDArray[np.uint8], NDArray[np.float32]]


@dataclass(frozen=True)
class LoopTerms:
    """What every rank must know of a pruned data set.

    Attributes:
        signals: what the method needs to see of a sample in training.
        sweep_signals: the same in a forward-only pass.
        about: what a state must share to be loaded: fingerprint, samples, batch size, epochs, seed.
    """

    signals: tuple[str, ...]
    sweep_signals: tuple[str, ...]
    num_epochs: int
    batch_size: int
    about: dict[str, Any]


class LoopActor(ScoreActor):
    """A ScoreActor that takes its state from the user's checkpoints."""

    def terms(self) -> LoopTerms:
        """Return what the ranks must know."""
        spec = self._spec
        about = {
            "fingerprint": spec.source.fingerprint,
            "num_samples": len(spec.source),
            "shuffle": shuffle_name(spec.source),
            "num_epochs": spec.num_epochs,
            "batch_size": spec.batch_size,
            "last_batch": spec.last_batch,
            "seed": spec.seed,
        }
        method = build_method(spec.method)
        signals, swept = method.signals, method.sweep_signals or method.signals
        return LoopTerms(signals, swept, spec.num_epochs, spec.batch_size, about)

    def restore(self, generation: int, epoch: int, state: Mapping[str, NDArray[Any]] | None) -> None:
        """Begin `generation` at `epoch`, with the state that a checkpoint holds, or anew at epoch 0.

        Raises:
            ValueError: the state is of another method or data set.
        """
        selector = self._spec.selector()
        if state is not None:
            selector.load_state_dict({name: np.array(array) for name, array in state.items()})
        selector.begin_epoch(epoch)
        self._selector, self._generation, self._passed = selector, generation, None
        self._start_epoch()

    def _state_before(self, epoch: int, step: int) -> Selector:
        if (epoch, step) > (0, 0):
            raise ObservationsLost(
                "the ScoreActor was lost with its scores: the loop goes back to its last checkpoint "
                "(save shard.state_dict(), and give FailureConfig(max_failures=…))"
            )
        return super()._state_before(epoch, step)

    def wanted(self, known: tuple[Any, ...] | None) -> Wanted | None:
        """Return what the running pass asks for, for streams that are filtered.

        Args:
            known: the key of what the asker has; where it is still that, the answer is None.

        Returns:
            A key, codes (N,) uint8 (0 = not wanted), and the weight of each code from 1 on.
        """
        # Before the first pass Ray Data may look at a data set's schema: it sees all of it.
        if self._pass is None or self._selector is None:
            return (0,), np.ones(len(self._spec.source), dtype=np.uint8), np.ones(1, dtype=np.float32)
        epoch, phase = self._pass.key.epoch, self._pass.phase
        key = (self._generation, epoch, phase)
        if key == known:
            return None
        selection = self._selector.begin_epoch(epoch)
        if phase == "train":
            return key, selection.codes, selection.weight_values
        scored = selection.scored_ids
        codes = np.zeros(selection.num_samples, dtype=np.uint8)
        codes[slice(None) if scored is None else scored] = 1
        return key, codes, np.ones(1, dtype=np.float32)

    def scores(self) -> dict[str, NDArray[Any]]:
        """Return the method's scores and what the table counts, name → (N,)."""
        selector = self._selector if self._selector is not None else self._spec.selector()
        counted = {"last_visit": selector.table.last_visit, "times_pruned": selector.table.times_pruned}
        return {**selector.scores(), **{name: np.array(column) for name, column in counted.items()}}
