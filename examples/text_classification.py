"""A text classifier in a loop of one's own, without Ray: InfoBatch leaves out part of the well-learned samples.

A small transformer tells lines of docstrings of Python's standard library from scikit-learn's: both are there offline.
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
    """Return the distinct lines of at least five words between triple quotes, each as its first words."""
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
            # A word's number is its checksum: no vocabulary to build, and the same in every process, unlike hash().
            row[: len(line)] = [1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in line]
    return {k: v[HELD_OUT:] for k, v in columns.items()}, {k: v[:HELD_OUT] for k, v in columns.items()}


class Classifier(torch.nn.Module):
    """One transformer layer and the mean over the words that are there."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Linear(WIDTH, 2)
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        hidden = self.layer(self.embed(tokens), src_key_padding_mask=tokens == 0)
        there = (tokens != 0).unsqueeze(2)
        return self.head((hidden * there).sum(1) / there.sum(1))


def train(method, columns, held_out):
    """Train a new classifier; return its accuracy and loss on the held-out lines and the samples it trained on."""
    torch.manual_seed(0)
    model, trained = Classifier(), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in rayprune.local_loader(columns, method, num_epochs=EPOCHS, batch_size=BATCH).epochs():
        for batch in epoch.iter_torch_batches():
            losses = cross_entropy(model(batch["tokens"]), batch["label"], reduction="none")
            loss = epoch.weigh(batch, losses)  # tells the method every sample's loss; kept ones stand for dropped ones
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained += epoch.num_kept
    labels = torch.from_numpy(held_out["label"])
    logits = model(torch.from_numpy(held_out["tokens"])).detach()
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": accuracy, "loss": cross_entropy(logits, labels).item(), "trained": trained}


def main():
    """Train on everything and with InfoBatch; print and return both results."""
    columns, held_out = load()
    print("which library is a docstring's line from? (guessing is right half of the time)")
    results = {}
    for name, method in (("full", rayprune.Full()), ("pruned", rayprune.InfoBatch(prune_ratio=0.5))):
        found = results[name] = train(method, columns, held_out)
        print(f"{name}: accuracy {found['accuracy']:.1%}, loss {found['loss']:.3f}, {found['trained']} samples trained")
    saved = 1 - results["pruned"]["trained"] / results["full"]["trained"]
    print(f"InfoBatch trained on {saved:.0%} fewer samples")
    return results | {"saved": saved}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a network as small as this one gains nothing from more
    main()
