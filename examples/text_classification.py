"""A text classifier in a custom loop without Ray: InfoBatch prunes part of the well-learned samples.

A small transformer distinguishes docstring lines of Python's standard library from those of scikit-learn. Both are
available offline.
"""

import random
import re
import sysconfig
import zlib
from pathlib import Path

import numpy as np
import sklearn
import torch
from torch.nn.functional import cross_entropy

import rayprune

EPOCHS, BATCH, WORDS, VOCABULARY, WIDTH, SAMPLES, HELD_OUT = 6, 64, 16, 4096, 32, 4000, 800


def docstring_lines(files):
    """Return the first words of each distinct line of five or more words between triple quotes."""
    quoted = (re.findall(r'"""(.+?)"""', file.read_text(encoding="utf-8"), re.DOTALL) for file in sorted(files))
    texts = (line.lower() for texts in quoted for line in "\n".join(texts).splitlines())
    return [words for words in dict.fromkeys(tuple(re.findall("[a-z]+", text)[:WORDS]) for text in texts) if words[4:]]


def load():
    """Return training and held-out columns: `tokens` (N, WORDS), 0 for padding, and `label`, the library."""
    columns = {"tokens": np.zeros((SAMPLES, WORDS), dtype=np.int64), "label": np.arange(SAMPLES) % 2}
    python, learn = Path(sysconfig.get_path("stdlib")), Path(sklearn.__file__).parent
    for label, files in enumerate((python.glob("*.py"), learn.glob("*/*.py"))):
        lines = random.Random(label).sample(docstring_lines(files), SAMPLES // 2)
        for row, line in zip(columns["tokens"][label::2], lines, strict=True):
            # A checksum is a word's number: it needs no vocabulary and, unlike hash(), is equal in every process.
            row[: len(line)] = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in line]
    return {k: v[HELD_OUT:] for k, v in columns.items()}, {k: v[:HELD_OUT] for k, v in columns.items()}


class Classifier(torch.nn.Module):
    """One transformer layer and the mean over the words without padding."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, 2)
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        hidden = self.layer(self.embed(tokens), src_key_padding_mask=tokens == 0)
        mask = (tokens != 0).unsqueeze(2)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def train(method, columns, held_out):
    """Train a new classifier; return accuracy and loss on the held-out lines, and the number of samples trained."""
    torch.manual_seed(0)
    model, trained = Classifier(), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = rayprune.torch.progress_lr(optimizer, lambda progress: 1 - progress)
    shard = rayprune.local_loader(columns, method, num_epochs=EPOCHS, batch_size=BATCH)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["tokens"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)  # reports every sample's loss to the method
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(shard.progress)
        trained += epoch.num_kept
    labels = torch.from_numpy(held_out["label"])
    logits = model(torch.from_numpy(held_out["tokens"])).detach()
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": accuracy, "loss": cross_entropy(logits, labels).item(), "trained": trained}


def main():
    """Train on everything and with InfoBatch; print and return both results."""
    columns, held_out = load()
    print("which library does a docstring line come from? (chance level: 50 %)")
    results = {}
    for name, method in (("full", rayprune.Full()), ("pruned", rayprune.InfoBatch(prune_ratio=0.5))):
        run = results[name] = train(method, columns, held_out)
        print(f"{name}: accuracy {run['accuracy']:.1%}, loss {run['loss']:.3f}, {run['trained']} samples trained")
    saved = 1 - results["pruned"]["trained"] / results["full"]["trained"]
    print(f"InfoBatch trained on {saved:.0%} fewer samples")
    return results | {"saved": saved}


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more threads
    main()
