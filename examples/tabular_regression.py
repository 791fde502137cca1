"""Regression on tabular data in a custom loop without Ray: a method with a schedule, and a loss without classes.

scikit-learn's diabetes data: ten measurements per patient, and the progression of the disease a year later. RandomEpoch
draws a new random subset in every epoch, here smaller and smaller ones. It is the baseline for all other methods.
"""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from torch.nn.functional import mse_loss

import rayprune

EPOCHS, BATCH, HELD_OUT = 40, 16, 100


def load():
    """Return training and held-out columns: `features` (N, 10) and `progress` (N,), of mean 0 and variance 1."""
    features, progress = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(progress))
    columns = {"features": features[order], "progress": progress[order]}
    for name, values in columns.items():
        training = values[HELD_OUT:]  # the held-out part does not affect the scaling
        columns[name] = ((values - training.mean(0)) / training.std(0)).astype(np.float32)
    return {k: v[HELD_OUT:] for k, v in columns.items()}, {k: v[:HELD_OUT] for k, v in columns.items()}


def train(method, columns, held_out):
    """Train a new network; return R² and mean squared error on the held-out part, and the number of samples trained."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1), torch.nn.Flatten(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)
    scheduler = rayprune.torch.progress_lr(optimizer, lambda progress: 1 - progress)
    shard = rayprune.local_loader(columns, method, num_epochs=EPOCHS, batch_size=BATCH)
    trained = 0
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            # Any loss with one number per sample works: methods only see the numbers.
            losses = mse_loss(model(batch["features"]), batch["progress"], reduction="none")
            loss = epoch.weigh(batch, losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(shard.progress)
        trained += epoch.num_kept
    with torch.no_grad():
        predicted = model(torch.from_numpy(held_out["features"])).numpy()
    error = float(np.mean((predicted - held_out["progress"]) ** 2))
    return {"r2": r2_score(held_out["progress"], predicted), "loss": error, "trained": trained}


def main():
    """Train on everything and on shrinking random subsets; print and return both results."""
    columns, held_out = load()
    print(f"progression of diabetes in {HELD_OUT} held-out patients (predicting the mean has an R² of about 0)")
    # The pruned share grows linearly from 0 in the first epoch to 60 % in the last one.
    shrinking = rayprune.RandomEpoch(prune_ratio={"schedule": "linear", "start": 0.0, "end": 0.6}, replacement=False)
    results = {}
    for name, method in (("full", rayprune.Full()), ("pruned", shrinking)):
        result = results[name] = train(method, columns, held_out)
        print(f"{name}: R² {result['r2']:.3f}, squared error {result['loss']:.3f}, {result['trained']} samples trained")
    saved = 1 - results["pruned"]["trained"] / results["full"]["trained"]
    print(f"RandomEpoch trained on {saved:.0%} fewer samples")
    return results | {"saved": saved}


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more threads
    main()
