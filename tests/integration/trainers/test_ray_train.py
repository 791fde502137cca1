"""The trainers' own integrations with Ray Train, and the same objects of rayprune in their workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import rayprune
from tests.support.trainer_loops import BATCH, EPOCHS, N, Points, Record, new_model, planned_visits, visits_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


def train_huggingface(config: dict[str, Any]) -> None:
    """Train a small classifier with `prepare_trainer` and RayTrainReportCallback."""
    import transformers
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers.modeling_outputs import SequenceClassifierOutput

    torch.set_num_threads(1)
    points, record = Points(), Record()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = new_model()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = self.net(x)
            return SequenceClassifierOutput(torch.nn.functional.cross_entropy(logits, labels), logits)

    class Trainer(rayprune.huggingface.PrunedTrainer):
        def example_losses(self, outputs: Any, inputs: Any) -> Any:
            losses = super().example_losses(outputs, inputs)
            record.visit(self.run.epoch, self._batch.ids, losses.means)  # type: ignore[union-attr]
            return losses

    # With one folder for all, Ray's callback may copy a checkpoint that rank 0 still writes.
    folder = Path(config["out"]) / f"worker_{ray.train.get_context().get_world_rank()}"
    folder.mkdir()
    args = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.01,
        save_strategy="epoch",
        logging_strategy="epoch",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    data = [{"x": x, "labels": y} for x, y in zip(points.x, points.y, strict=True)]
    method = rayprune.InfoBatch(prune_ratio=0.7)
    trainer = Trainer(model=Model(), args=args, train_dataset=data, method=method)
    trainer.add_callback(RayTrainReportCallback())
    prepare_trainer(trainer).train()
    torch.save(record.end(trainer.model, trainer.selector), f"{config['out']}/rank_{args.process_index}.pt")


def train_lightning(config: dict[str, Any]) -> None:
    """Train with RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback and `prepare_trainer`."""
    import lightning.pytorch as pl
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    torch.set_num_threads(1)
    pruning, record = rayprune.lightning.PruneCallback(rayprune.InfoBatch(prune_ratio=0.7)), Record()

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = new_model()

        def training_step(self, batch: Any, index: int) -> Any:
            x, y, ids = batch
            losses = torch.nn.functional.cross_entropy(self.net(x), y, reduction="none")
            record.visit(self.current_epoch, ids, losses)
            return pruning.weigh(batch, losses)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[pruning, RayTrainReportCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Model()
    prepare_trainer(trainer).fit(model, train_dataloaders=pruning.loader(Points(), batch_size=BATCH))
    torch.save(record.end(model, pruning.selector), f"{config['out']}/rank_{trainer.global_rank}.pt")


@pytest.mark.parametrize("train", [train_huggingface, train_lightning])
def test_two_workers_of_ray_train_train_on_the_plan(train: Any, tmp_path: Path) -> None:
    trainer = TorchTrainer(
        train,
        train_loop_config={"out": str(tmp_path)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    )
    result = trainer.fit()
    assert result.checkpoint is not None
    records = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    visits = visits_of(records)
    assert visits == planned_visits(0.7, records, 2 * BATCH, seed=42 if train is train_huggingface else 0)
    assert visits[0] == Counter(range(N))
    assert sum(visits[1].values()) < 80
    for name, column in records[0].scores.items():
        np.testing.assert_array_equal(records[1].scores[name], column)
