"""The loop of plain_loop.py on the samples worth training on: InfoBatch, with Ray Data and Ray Train."""

from pathlib import Path

import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import rayprune

EPOCHS, BATCH, WORKERS = 10, 64, 1


def load():
    """Return the 1,797 handwritten digits as columns."""
    bunch = load_digits()
    return {"image": (bunch.images / 16).astype("float32"), "label": bunch.target.astype("int64")}


def train_loop(config):
    """Train on this worker's share of every batch."""
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    model = prepare_model(torch.nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = rayprune.torch.progress_lr(optimizer, lambda progress: 1 - progress)
    trained = 0
    shard = rayprune.get_dataset_shard("train")
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(shard.progress)
            trained += len(losses)
        print(f"epoch {int(epoch)}: loss {losses.mean().item():.4f}, {trained} samples trained")


def main():
    """Train."""
    data = rayprune.prune(load(), method=rayprune.InfoBatch(prune_ratio=0.5), num_epochs=EPOCHS, batch_size=BATCH)
    trainer = TorchTrainer(
        train_loop,
        datasets={"train": data},
        scaling_config=ray.train.ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="pruned_loop", storage_path=str(Path("runs").resolve())),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
