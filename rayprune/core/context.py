"""Where the run stands when a method selects, and the draws that it may make."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayprune.core.selection import Selection
from rayprune.core.thinning import thin, thin_with_class_floor


class EpochContext:
    """Tell a method where the run stands when it selects.

    Attributes:
        epoch, num_epochs: 0-based epoch e of E.
        num_samples: N.
        labels: (N,) class of each sample, or None.
        visits_before: samples kept in all earlier epochs together.
        chosen: the selection of a file that the method names, or None.
    """

    def __init__(
        self,
        epoch: int,
        num_epochs: int,
        num_samples: int,
        seed: int,
        labels: NDArray[Any] | None = None,
        class_floor: float = 0.0,
        visits_before: int = 0,
        chosen: Selection | None = None,
    ) -> None:
        self.epoch, self.num_epochs, self.num_samples = epoch, num_epochs, num_samples
        self.labels, self.visits_before, self.chosen = labels, visits_before, chosen
        self._seed, self._class_floor = seed, class_floor

    @cached_property
    def rng(self) -> np.random.Generator:
        """The epoch's generator, `default_rng([seed, epoch])`; every draw of the selection comes from it."""
        return self.rng_of(self.epoch)

    def rng_of(self, epoch: int) -> np.random.Generator:
        """Return a fresh generator of another epoch, for a choice that must come out the same in several epochs."""
        return np.random.default_rng([self._seed, epoch])

    def derived_rng(self, purpose: int, epoch: int | None = None) -> np.random.Generator:
        """Return a generator for one purpose (an integer from 2), independent of `rng` and of the plan's."""
        return np.random.default_rng([self._seed, self.epoch if epoch is None else epoch, purpose])

    def thin(self, strata: NDArray[np.unsignedinteger[Any]], keep_ratios: ArrayLike) -> Selection:
        """Thin strata at random without bias, above the class floor where one is set.

        Args:
            strata: (N,) unsigned integers; 0 = kept whole, s ≥ 1 = thinned to `keep_ratios[s - 1]`.
            keep_ratios: (S,) in (0, 1].
        """
        ratios = np.asarray(keep_ratios, dtype=np.float64)
        if self._class_floor > 0 and self.labels is not None:
            return thin_with_class_floor(strata, ratios, self.labels, self._class_floor, self.rng)
        return thin(strata, ratios, self.rng)
