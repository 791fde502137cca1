"""A causal language model in a custom loop without Ray: whole sequences are pruned by their mean loss.

The text comes with Python: lines of the language reference as shown by `help()`. A small transformer predicts every
character from the previous ones. The losses have shape (lines, characters); the mask excludes padding from the mean.
"""

from pydoc_data.topics import topics

import numpy as np
import torch
from torch.nn.functional import cross_entropy

import rayprune

EPOCHS, BATCH, LENGTH, WIDTH, LINES, HELD_OUT, SIZE = 5, 16, 32, 32, 1400, 200, 128


def load():
    """Return training and held-out column `line` (N, LENGTH + 1): ASCII codes between newlines, 0 for padding."""
    texts = "\n".join(topics.values()).splitlines()
    lines = sorted({line.strip()[:LENGTH] for line in texts if line.isascii()} - {""})
    rows = np.zeros((LINES, LENGTH + 1), dtype=np.int64)
    for row, line in zip(rows, np.random.default_rng(0).choice(lines, LINES, replace=False), strict=True):
        text = f"\n{line}\n".encode()[: LENGTH + 1]
        row[: len(text)] = list(text)
    return {"line": rows[HELD_OUT:]}, {"line": rows[:HELD_OUT]}


class LanguageModel(torch.nn.Module):
    """Character and position embeddings, two causal layers, and logits of every next character."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = torch.nn.Embedding(SIZE, WIDTH), torch.nn.Embedding(LENGTH, WIDTH)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, SIZE)
        self.register_buffer("causal_mask", torch.nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, characters):
        # Padding follows the text, and causal layers never look ahead: it needs no mask of its own.
        hidden = self.embed(characters) + self.position.weight
        return self.head(self.encoder(hidden, mask=self.causal_mask, is_causal=True))


def losses_of(model, lines):
    """Return the loss of every next character and a mask of those that are text, both (B, LENGTH)."""
    inputs, targets = lines[:, :-1], lines[:, 1:]
    return cross_entropy(model(inputs).transpose(1, 2), targets, reduction="none"), targets != 0


def train(method, columns, held_out):
    """Train a new model; return its loss per character on the held-out lines and the number of sequences trained."""
    torch.manual_seed(0)
    model, trained = LanguageModel(), 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = rayprune.torch.progress_lr(optimizer, lambda progress: 1 - progress)
    shard = rayprune.local_loader(columns, method, num_epochs=EPOCHS, batch_size=BATCH)
    for epoch in shard.epochs():
        for batch in epoch.iter_torch_batches():
            losses, mask = losses_of(model, batch["line"])
            loss = epoch.weigh(batch, losses, mask=mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(shard.progress)
        trained += epoch.num_kept
    with torch.no_grad():
        losses, mask = losses_of(model, torch.from_numpy(held_out["line"]))
    return {"loss": losses[mask].mean().item(), "trained": trained}


def main():
    """Train on everything and with InfoBatch; print and return both results."""
    columns, held_out = load()
    # Baseline: the loss of a model that knows only how frequent each character is.
    counts = np.bincount(columns["line"][:, 1:].ravel(), minlength=SIZE)[1:] + 1
    characters = held_out["line"][:, 1:]
    baseline = -np.log(counts / counts.sum())[characters[characters > 0] - 1].mean().item()
    print(f"baseline, character frequencies: {baseline:.3f} nats per character")
    results = {}
    for name, method in (("full", rayprune.Full()), ("pruned", rayprune.InfoBatch(prune_ratio=0.5))):
        result = results[name] = train(method, columns, held_out)
        print(f"{name}: {result['loss']:.3f} nats per character, {result['trained']} sequences trained")
    saved = 1 - results["pruned"]["trained"] / results["full"]["trained"]
    print(f"InfoBatch trained on {saved:.0%} fewer sequences")
    return results | {"saved": saved, "baseline": baseline}


if __name__ == "__main__":
    torch.set_num_threads(1)  # so small a network gains nothing from more threads
    main()
