"""What a ScoreActor is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayprune.core.plan import BLOCK_ROWS, LastBatch
from rayprune.core.references import UserCode
from rayprune.core.selection import Selection
from rayprune.core.selector import Selector
from rayprune.core.table import ScoreTable
from rayprune.engine.storage.checkpoint import checkpoint_path, is_written
from rayprune.engine.storage.loop_run import LoopRun
from rayprune.errors import CheckpointPending, ObservationsLost
from rayprune.methods import Method, build_method
from rayprune.paths import as_path
from rayprune.sources import SampleSource

if TYPE_CHECKING:
    from rayprune.engine.scoring.shards import ShardGroup


@dataclass(frozen=True)
class ScoreSpec:
    """Everything a ScoreActor is built from; small, because each restart sends it again.

    Attributes:
        method: the method's config, or the method itself if it is not registered.
        source: the training source; its groups decide the shuffle.
        num_validation: rows of the validation split, 0 without one.
        num_epochs, seed: the run's.
        batch_size: rows of a global batch.
        last_batch: whether the last batch is padded or dropped.
        row_bytes: bytes of one decoded training row.
        run_folder: where checkpoints are read and selections written; None for no folder.
        keep_selections: how many epochs' selections stay on disk.
        labeled: whether to read the labels, for methods that need them and for the fraction kept of each class.
        chosen: the selection of a method that reads one from a file.
        record: signals whose mean over the visits is kept beside the method's scores.
        visits_collected: samples that an earlier scoring run trained on.
        meta_every: training batches per meta batch, as in `Plan.of_selection`.
        task_rows: the largest number of rows in a read task of the stream.
        loop_run: the run folder of a user's loop.
        audits: whether a user's loop keeps what an audit needs of its training visits.
        checkpoint_epochs: epochs between the checkpoints at their ends.
        shards: the actors that hold the score table, each a range of the samples; None for the ScoreActor itself.
        user_code: the user's modules, for an actor on another machine.
    """

    method: dict[str, Any] | Method
    source: SampleSource
    num_validation: int
    num_epochs: int
    seed: int
    batch_size: int
    last_batch: LastBatch
    row_bytes: int
    run_folder: str | None
    keep_selections: int
    labeled: bool = False
    chosen: Selection | None = None
    record: tuple[str, ...] = ()
    visits_collected: int = 0
    meta_every: int = 0
    task_rows: int = BLOCK_ROWS
    loop_run: LoopRun | None = None
    audits: bool = False
    checkpoint_epochs: int = 1
    shards: ShardGroup | None = None
    user_code: UserCode = field(default_factory=UserCode, compare=False)

    def selector(self, table: ScoreTable | None = None) -> Selector:
        """Build a fresh Selector, with a score table of its own unless one is given."""
        labels = self.source.labels if self.labeled else None
        run = (len(self.source), self.num_epochs, self.seed)
        return Selector(
            build_method(self.method),
            *run,
            labels,
            chosen=self.chosen,
            record=self.record,
            visits_collected=self.visits_collected,
            table=table,
        )

    def checkpoint_before(self, epoch: int, step: int) -> Path | None:
        """Return the checkpoint of the state before a step; None at the start of the run.

        Raises:
            CheckpointPending: it is not written yet.
            ObservationsLost: it never will be.
        """
        if (epoch, step) == (0, 0):
            return None
        assert self.run_folder is not None
        checkpoint = checkpoint_path(as_path(self.run_folder), epoch, step)
        if is_written(checkpoint):
            return checkpoint
        if step == 0 and epoch % self.checkpoint_epochs:
            raise ObservationsLost(
                f"the ScoreActor has died, and the scores before epoch {epoch + 1} are in no checkpoint "
                f"(run.checkpoint_epochs = {self.checkpoint_epochs}): the run goes on from its last one"
            )
        raise CheckpointPending(f"the checkpoint before step {step} of epoch {epoch} is not written yet")
