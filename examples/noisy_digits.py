"""Digits with wrong labels and duplicates, to try `rayprune audit` on; docs/auditing.md walks through it.

python examples/noisy_digits.py noisy_digits.npz
rayprune audit digits_audit data.path=noisy_digits.npz run.name=noisy_digits
python examples/noisy_digits.py noisy_digits.npz runs/noisy_digits
"""

import sys

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

NOISE, COPIES, LEAKS, VALIDATION = 0.15, 20, 10, 400


def write(path: str) -> None:
    """Write images and labels: 15 % of the training labels are wrong, and some images occur twice."""
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    images, labels = (digits.images[order] * 15).astype(np.uint8), digits.target[order]
    x_test, y_test, x_train, true = images[:VALIDATION], labels[:VALIDATION], images[VALIDATION:], labels[VALIDATION:]
    copies = rng.choice(len(x_train), COPIES, replace=False)
    x_train = np.concatenate([x_train, x_train[copies], x_test[:LEAKS]])
    true = np.concatenate([true, true[copies], y_test[:LEAKS]])
    wrong = rng.random(true.size) < NOISE
    given = np.where(wrong, (true + rng.integers(1, 10, true.size)) % 10, true)
    np.savez(path, x_train=x_train, y_train=given, x_test=x_test, y_test=y_test, true=true)


def check(path: str, run: str) -> None:
    """Compare an audit's findings with what is known here."""
    true, audit = np.load(path)["true"], pd.read_parquet(f"{run}/audit.parquet")
    wrong, suspects = (audit.label != true).to_numpy(), (audit.p_wrong >= 0.5).to_numpy()
    print(f"wrong labels: {wrong.mean():.1%}; by the audit: {audit.p_wrong.mean():.1%}")
    print(f"AUC of p_wrong: {roc_auc_score(wrong, audit.p_wrong):.3f}")
    print(f"suspects: {suspects.sum()}, of which {wrong[suspects].mean():.1%} are wrong")
    print(f"suggested label is the true one for {(audit.suggested_label == true)[suspects].mean():.1%} of the suspects")
    copied = np.arange(len(audit)) >= len(audit) - COPIES - LEAKS
    print(f"copies found: {(audit.duplicate_of >= 0)[copied].sum()} of {COPIES + LEAKS}")


if __name__ == "__main__":
    write(sys.argv[1]) if len(sys.argv) == 2 else check(*sys.argv[1:])
