"""A custom network with several exits, trained with learned sample weights and pruning, then used with early exits.

    python examples/early_exit.py                # about a minute; writes runs/early_exit

or from the command line, with the same network:

    rayprune train configs/digits_msdnet_l2w.yaml model='{name: examples/early_exit.py:ladder}' run.name=ladder
    rayprune evaluate runs/ladder --trust
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rayprune.config import make_config
from rayprune.engine.train.driver import train
from rayprune.experiments.early_exit.evaluate import evaluate, open_run
from rayprune.experiments.early_exit.profile import read_thresholds
from rayprune.nn.early_exit import EarlyExit
from rayprune.nn.models.multi_exit import MultiExit

BUDGET = 10  # p in 1..39: smaller values let more samples exit early


class Ladder(MultiExit):
    """Convolutions with an exit after each; `advance` computes only up to the next exit."""

    def __init__(self, channels: int, num_exits: int, num_classes: int) -> None:
        super().__init__(num_exits)
        widths = [channels, *([16] * num_exits)]
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths)
        )
        self.heads = nn.ModuleList(nn.Linear(16, num_classes) for _ in range(num_exits))

    def advance(self, exit: int, state: Any) -> tuple[Tensor, Any]:
        """Return the logits of an exit, and the features for the next one."""
        features = self.steps[exit](state)
        return self.heads[exit](features.mean(dim=(2, 3))), features


def ladder(*, num_classes: int, input_shape: tuple[int, ...], num_exits: int = 3) -> nn.Module:
    """Build the network of `model: {name: examples/early_exit.py:ladder}`."""
    return Ladder(input_shape[0], num_exits, num_classes)


def main(storage: str = "runs", epochs: int = 30) -> dict[str, float]:
    """Train, determine thresholds, and classify the test digits with early exits; print and return the results."""
    config = make_config(
        {
            "data": {"source": "digits", "hold_out": 0.15},
            "model": {"name": f"{Path(__file__).resolve()}:ladder"},
            "method": {"name": "infobatch", "prune_ratio": 0.5},
            "train": {"epochs": epochs, "batch_size": 64, "step": {"name": "l2w", "normalise": "mat", "epsilon": 0.3}},
            "optim": {"lr": 0.2, "weight_decay": 1e-4},
            "scaling": {"num_workers": 0, "threads": 1},
            "run": {"storage_path": storage, "name": "early_exit"},
        }
    )
    result = train(config)
    # The run's config names code, this file, which we trust.
    evaluation = evaluate(result.folder, None, torch.device("cpu"), trust=True, on_notice=print)
    network = open_run(result.folder, torch.device("cpu"), trust=True).network
    classify = EarlyExit(network, read_thresholds(result.folder, BUDGET).tolist())
    one_image = torch.zeros(1, 1, 8, 8)
    logits, exits = classify.predict(one_image)
    assert tuple(logits.shape) == (1, 10)
    early = next(row for row in evaluation.dynamic if row["p"] == BUDGET)
    summary = {
        "last_exit": evaluation.anytime[-1]["top1"],
        "leaving_early": early["top1"],
        "share_of_macs": early["macs"] / evaluation.macs[-1],
        "left_first": early["share_1"],
        "saved": 1 - result.metrics[-1]["samples_trained"] / (epochs * result.metrics[-1]["num_samples"]),
    }
    print(f"accuracy of the last exit: {summary['last_exit']:.1%}; with early exits: {summary['leaving_early']:.1%}")
    print(f"at {summary['share_of_macs']:.0%} of the multiply-adds; {summary['left_first']:.0%} take the first exit")
    print(f"pruned {summary['saved']:.0%} of the visits; a blank image takes exit {int(exits) + 1}")
    return summary


if __name__ == "__main__":
    main()
