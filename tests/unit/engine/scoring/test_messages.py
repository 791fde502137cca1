"""Packed pushes keep every array's values, dtype and shape."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayprune.engine.scoring.messages import pack, unpack

COLUMNS = st.lists(st.tuples(st.sampled_from(["f4", "f8", "i8", "u1", "?"]), st.integers(0, 3)), max_size=4)


@given(num_rows=st.integers(0, 9), columns=COLUMNS, seed=st.integers(0, 2**32 - 1))
def test_unpacking_returns_what_was_packed(num_rows: int, columns: list[tuple[str, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 2**62, num_rows)
    signals = {
        f"signal{number}": rng.integers(0, 200, (num_rows, width) if width else num_rows).astype(dtype)
        for number, (dtype, width) in enumerate(columns)
    }
    unpacked = unpack(*pack(ids, signals))
    assert list(unpacked) == ["id", *signals]
    assert unpacked["id"].dtype == np.int64
    for name, expected in {"id": ids, **signals}.items():
        assert unpacked[name].dtype == expected.dtype
        assert np.array_equal(unpacked[name], expected)
