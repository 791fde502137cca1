"""Train on an existing subset: a file of ids and weights, such as `rayprune select` writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rayprune.core.method import EpochContext, Method
from rayprune.core.selection import Selection
from rayprune.core.table import ScoreTable
from rayprune.errors import ConfigError
from rayprune.methods.registry import register


@register("fixed")
@dataclass(frozen=True)
class Fixed(Method):
    """Keep the ids of a file, with its weights, in every epoch.

    Args:
        path: a selection file, .parquet or .txt; in a config, relative paths start at the folder of the command.
        batch_mean_weights: every sample of a batch gets the mean weight of its global batch instead of its own.
    """

    kind = "static"
    keeps = "the samples listed in a file"
    paper = "a given subset"
    signals = ("loss",)
    fixed = True

    path: str = ""
    batch_mean_weights: bool = False

    def select(self, table: ScoreTable, context: EpochContext) -> Selection:
        """Return the selection of the file.

        Raises:
            ConfigError: the Selector has no selection.
        """
        if context.chosen is None:
            cure = f"give the Selector chosen=, the selection of {self.path}"
            if not self.path:
                cure = "set method.path=selection.parquet (rayprune select writes one)"
            raise ConfigError(f"method 'fixed' has no selection: {cure}")
        num_dropped = context.num_samples - context.chosen.num_kept
        return replace(
            context.chosen,
            requested=num_dropped / context.num_samples,
            expected_drops=num_dropped,
            batch_mean_weights=self.batch_mean_weights,
        )
