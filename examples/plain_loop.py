"""A plain Ray Train loop; pruned_loop.py is the same loop on the samples worth training on."""

from pathlib import Path

import ray.data
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

EPOCHS, BATCH, WORKERS = 10, 64, 1
STEPS = EPOCHS * -(-1797 // BATCH)


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
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    trained = 0
    shard = ray.train.get_dataset_shard("train")
    for epoch in range(EPOCHS):
        for batch in shard.iter_torch_batches(batch_size=BATCH // WORKERS, device=get_device()):
            losses = cross_entropy(model(batch["image"]), batch["label"], reduction="none")
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            trained += len(losses)
        print(f"epoch {int(epoch)}: loss {losses.mean().item():.4f}, {trained} samples trained")


def main():
    """Train."""
    columns = load()
    data = ray.data.from_items([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    trainer = TorchTrainer(
        train_loop,
        datasets={"train": data},
        scaling_config=ray.train.ScalingConfig(num_workers=WORKERS, resources_per_worker={"CPU": 0.5}),
        run_config=ray.train.RunConfig(name="plain_loop", storage_path=str(Path("runs").resolve())),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
