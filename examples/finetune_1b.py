"""A recipe: fine-tune a causal language model of a billion parameters with TRL, pruned by sequence.

    torchrun --nproc-per-node 8 examples/finetune_1b.py --model MODEL --dataset DATASET

MODEL is an instruct model, DATASET has rows of `messages`, of `prompt` and `completion`, or of `text`; each is a folder
or a name. The recipe has not been measured: compare `--method full` and `--method random_epoch` at the same learning
rate before you rely on it.
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import rayprune
from rayprune.huggingface import PrunedTrainer

DEFAULTS = {"model": "", "dataset": "", "out": "finetuned", "method": "infobatch"}
DEFAULTS |= {"prune_ratio": 0.5, "epochs": 3, "max_length": 2048}


class Trainer(PrunedTrainer, SFTTrainer): ...


def main(words=None, **changes):
    """Train, and return the trainer; `changes` replace settings of SFTConfig."""
    parser = argparse.ArgumentParser(description="Fine-tune a language model, pruned by sequence.")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, required=not value)
    options = parser.parse_args(words)
    ratio = {} if options.method == "full" else {"prune_ratio": options.prune_ratio}
    config = {
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "bf16": True,
        "gradient_checkpointing": True,
        "packing": False,  # packed examples can't be left out one by one
        "padding_free": True,
        "max_length": None,  # TRL does not cut padding-free examples: longer ones are left out below
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "flash_attention_2"},
    }
    trainer = Trainer(
        model=options.model,
        args=SFTConfig(options.out, **(config | changes)),
        train_dataset=load_dataset(options.dataset, split="train"),
        method=rayprune.build_method({"name": options.method, **ratio}),
    )
    # Ids are positions in the dataset that the trainer has prepared, so filter it before train().
    with trainer.args.main_process_first():
        trainer.train_dataset = trainer.train_dataset.filter(lambda row: len(row["input_ids"]) <= options.max_length)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
