"""Digests of content too large to hash whole."""

from __future__ import annotations

import numpy as np

from rayprune.sources.fingerprint import array_digest, file_digest


def test_large_content_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("rayprune.sources.fingerprint.WHOLE_BYTES", 1 << 12)
    monkeypatch.setattr("rayprune.sources.fingerprint.SAMPLE_BYTES", 1 << 8)
    file = tmp_path / "content"
    content = np.random.default_rng(0).integers(0, 256, 1 << 16).astype(np.uint8)
    prints = set()
    for length in (1 << 16, (1 << 16) - 1):
        file.write_bytes(content[:length].tobytes())
        prints.add(file_digest(file))
    changed = content.copy()
    changed[-1] ^= 1
    assert len(prints) == 2
    assert array_digest(content) != array_digest(changed)
