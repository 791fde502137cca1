"""Train on a subset that was chosen before: a file of ids and weights, as `rayprune select` writes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayprune.core.selection import Selection
from rayprune.core.selector import EpochContext
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.base import Method
from rayprune.methods.registry import register


@register("fixed")
@dataclass(frozen=True)
class Fixed(Method):
    """Keep the ids of a file, with its weights, in every epoch.

    Args:
        path: a selection, .parquet or .txt; in a config, relative paths begin at the folder of the command.
        batch_mean_weights: every sample of a batch takes the mean weight of its global batch in place of its own.
    """

    kind = "static"
    paper = "a subset chosen before"
    signals = ("loss",)
    fixed = True

    path: str = ""
    batch_mean_weights: bool = False

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Return the selection of the file.

        Raises:
            ValueError: the Selector was not given it.
        """
        if context.chosen is None:
            cure = f"give the Selector chosen=, the selection of {self.path}"
            if not self.path:
                cure = "set method.path=selection.parquet (rayprune select writes one)"
            raise ConfigError(f"method 'fixed' has no selection: {cure}")
        dropped = context.num_samples - context.chosen.num_kept
        return replace(
            context.chosen,
            requested=dropped / context.num_samples,
            expected_drops=dropped,
            batch_mean_weights=self.batch_mean_weights,
        )
