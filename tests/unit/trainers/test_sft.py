"""Fine-tuning with TRL's SFTTrainer: the plan's sequences are trained, and their losses are those of each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import rayprune
from rayprune.errors import ConfigError
from rayprune.huggingface import PrunedTrainer, keep_by_score
from rayprune.sources.tables.selections import write_selection_file
from tests.support.language import loss_of, tiny_llama, tokenizer

NUM = 24


class Trainer(PrunedTrainer, SFTTrainer):
    """Record the planned and the visited ids of every epoch."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        run = self.run
        if run.step == 0:
            self.plans: list[list[int]] = [*getattr(self, "plans", []), run.plan.selection.ids.tolist()]
            self.visits: list[list[int]] = [*getattr(self, "visits", []), []]
        self.visits[-1] += np.asarray(inputs["rayprune_id"]).tolist()
        return super().training_step(model, inputs, *args, **kwargs)


def texts(prompts: bool) -> Dataset:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh 123"), rng.integers(4, 15))) for _ in range(NUM)]
    if not prompts:
        return Dataset.from_dict({"text": words})
    return Dataset.from_dict({"prompt": [f"q{word[:2]}" for word in words], "completion": words})


def trainer_of(folder: Path, method: Any, *, prompts: bool = False, **options: Any) -> Trainer:
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        **{"learning_rate": 0.0, "padding_free": True, "packing": False, **options},
    )
    return Trainer(
        model=tiny_llama(),
        args=arguments,
        train_dataset=texts(prompts),
        processing_class=tokenizer(),
        method=method,
    )


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_visits_are_the_plan_and_losses_those_of_each_sequence(
    tmp_path: Path, padding_free: bool, prompts: bool, loss_type: str
) -> None:
    options: dict[str, Any] = {"padding_free": padding_free, "loss_type": loss_type}
    trainer = trainer_of(tmp_path, rayprune.InfoBatch(prune_ratio=0.5, anneal_start=1.0), prompts=prompts, **options)
    if loss_type == "dft":  # weighs the tokens' losses by their probabilities
        with pytest.raises(ConfigError, match="override example_losses"):
            trainer.train()
        return
    trainer.train()
    # With a learning rate of 0 all losses are those of the first model.
    losses = trainer.selector.scores()["loss"]
    assert trainer.train_dataset is not None
    for row, loss in zip(trainer.train_dataset, losses, strict=True):
        labels = row.get("labels", row["input_ids"])
        first = max(1, next(at for at, label in enumerate(labels) if label != -100))
        assert loss == pytest.approx(loss_of(trainer.model, row["input_ids"], first), rel=1e-4)
    assert [sorted(visits) for visits in trainer.visits] == trainer.plans
    assert [len(plan) < NUM for plan in trainer.plans] == [False, True, True]
    assert set(np.flatnonzero(losses > losses.mean() + 1e-6).tolist()) < set(trainer.plans[1])


def test_a_file_chooses_the_sequences(tmp_path: Path) -> None:
    quality = np.arange(NUM) % 5
    method = keep_by_score(quality, tmp_path / "chosen.parquet", keep=8)
    trainer = trainer_of(tmp_path, method)
    trainer.train()
    kept = sorted([*np.flatnonzero(quality == 4), *np.flatnonzero(quality == 3)[:4]])
    assert [sorted(visits) for visits in trainer.visits] == [kept] * 3


def test_clusters_of_trajectories_choose_after_the_scoring_epochs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rayprune.S2L(prune_ratio=0.5, score_epochs=2, clusters=4), learning_rate=1e-3)
    trainer.train()
    assert [len(set(visits)) for visits in trainer.visits] == [NUM, NUM, NUM // 2]
    assert [sorted(visits) for visits in trainer.visits] == trainer.plans
    path = write_selection_file(tmp_path / "chosen.parquet", trainer.run.plan.selection)
    large = trainer_of(tmp_path, rayprune.Fixed(str(path)), learning_rate=1e-3)
    large.train()
    assert [sorted(visits) for visits in large.visits] == trainer.plans[-1:] * 3


def test_packing_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set packing=False and padding_free=True"):
        trainer_of(tmp_path, rayprune.InfoBatch(), packing=True)


def test_pruned_sequences_train_as_the_weighted_loss_says(tmp_path: Path) -> None:
    """Padded and padding-free batches end with the same parameters."""
    ends = []
    for padding_free in (True, False):
        trainer = trainer_of(
            tmp_path / str(padding_free), rayprune.InfoBatch(), learning_rate=1e-2, padding_free=padding_free
        )
        trainer.train()
        ends.append(torch.cat([parameter.flatten() for parameter in trainer.model.parameters()]).detach())
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)
