"""Fine-tuning with the Trainer of Hugging Face: whole sequences are pruned by their mean loss.

The text comes with Python: lines of the language reference as shown by `help()`. A small Llama with random weights
predicts every byte from those before it. Batches are padding-free: all lines of a batch in one row. Three runs are
compared: all lines, InfoBatch, and as many lines drawn at random in every epoch. With a number, the script repeats them
with as many seeds: python examples/finetune_text.py 5
"""

import sys
import tempfile
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import rayprune
from rayprune.huggingface import PrunedTrainer, sequence_scores

EPOCHS, BATCH, LENGTH, WIDTH, LINES, HELD_OUT, SIZE, RATE = 5, 16, 48, 64, 1200, 200, 128, 3e-3


def load():
    """Return training and held-out column `input_ids`: a list of byte arrays, each a line between newlines."""
    texts = "\n".join(topics.values()).splitlines()
    lines = sorted({line.strip()[:LENGTH] for line in texts if line.isascii()} - {""})
    chosen = np.random.default_rng(0).choice(lines, LINES, replace=False)
    rows = [np.frombuffer(f"\n{line}\n".encode(), dtype=np.uint8).astype(np.int64) for line in chosen]
    return {"input_ids": rows[HELD_OUT:]}, {"input_ids": rows[:HELD_OUT]}


def items(columns):
    """Return a map-style dataset: a list of mappings."""
    return [{"input_ids": row.tolist()} for row in columns["input_ids"]]


def train(method, columns, held_out, seed=0):
    """Train a new model; return its loss per byte on the held-out lines and the number of sequences trained."""
    set_seed(seed)
    sizes = {"vocab_size": SIZE, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "max_position_embeddings": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    # Without a cache, attention stays within each line of a padding-free batch.
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False, pad_token_id=0))
    collator = DataCollatorWithFlattening()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = _Counting(model=model, args=args, train_dataset=items(columns), data_collator=collator, method=method)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    scores = sequence_scores(model, items(held_out), collator, batch_size=BATCH)
    loss = np.average(scores["loss"], weights=scores["num_tokens"])
    return {"loss": float(loss), "trained": trainer.num_trained}


class _Counting(PrunedTrainer):
    num_trained = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.num_trained += int((inputs["position_ids"] == 0).sum())
        return super().training_step(model, inputs, *args, **kwargs)


def main(seed=0):
    """Make the three runs; print and return their results."""
    columns, held_out = load()
    # Baseline: the loss of a model that knows only how frequent each byte is.
    counts = np.bincount(np.concatenate([row[1:] for row in columns["input_ids"]]), minlength=SIZE) + 1
    targets = np.concatenate([row[1:] for row in held_out["input_ids"]])
    baseline = -np.log(counts / counts.sum())[targets].mean().item()
    print(f"baseline, byte frequencies: {baseline:.3f} nats per byte")
    results = {}

    def run(name, method):
        result = results[name] = train(method, columns, held_out, seed)
        print(f"{name}: {result['loss']:.3f} nats per byte, {result['trained']} sequences trained")

    run("full", rayprune.Full())
    run("pruned", rayprune.InfoBatch(prune_ratio=0.5))
    saved = 1 - results["pruned"]["trained"] / results["full"]["trained"]
    run("random", rayprune.RandomEpoch(prune_ratio=saved))
    print(f"InfoBatch trained on {saved:.0%} fewer sequences")
    return results | {"saved": saved, "baseline": baseline}


def compare(num_seeds):
    """Repeat the runs with other seeds; print mean differences and their 95 % intervals (Student's t, paired)."""
    from scipy.stats import t

    runs = [main(seed) for seed in range(num_seeds)]
    losses = {name: np.array([run[name]["loss"] for run in runs]) for name in ("full", "pruned", "random")}
    for one, other in (("pruned", "full"), ("random", "full"), ("pruned", "random")):
        differences = losses[one] - losses[other]
        half = t.ppf(0.975, num_seeds - 1) * differences.std(ddof=1) / num_seeds**0.5
        print(f"{one} − {other}: {differences.mean():+.4f} ± {half:.4f} nats per byte, {num_seeds} seeds")
    print(f"InfoBatch trained on {np.mean([run['saved'] for run in runs]):.1%} fewer sequences on average")


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more threads
    compare(int(sys.argv[1])) if len(sys.argv) > 1 else main()
