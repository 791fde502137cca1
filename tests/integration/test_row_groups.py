"""Training from Parquet row groups without a cache: shuffle windows, both transports, and the bytes they read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayprune.core import Plan
from rayprune.core.plan import block_rows
from rayprune.engine.storage.run_folder import read_selection
from rayprune.engine.train.driver import RunResult, train
from rayprune.sources import open_data
from tests.support.runs import assert_same_run, run_config

GROUP_ROWS, BATCH, EPOCHS, BUFFER_BYTES = 16, 16, 2, 1 << 20
ROWS = {"train": 320, "test": 48}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of digits as PNG images: 20 row groups for training, 3 for validation."""
    folder = tmp_path_factory.mktemp("digits")
    rows = open_data("digits").train.take(np.arange(sum(ROWS.values())))
    first = 0
    for part, count in ROWS.items():
        encoded = []
        for pixels in rows["image"][first : first + count, ..., 0]:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            encoded.append(stream.getvalue())
        table = pa.table({"image": encoded, "label": rows["label"][first : first + count]})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=GROUP_ROWS)
        first += count
    return folder


def group_run(tmp_path: Path, digits: Path, name: str, workers: int, stream: str, **sections: Any) -> RunResult:
    base: dict[str, Any] = {
        "data": {"source": "parquet", "path": str(digits), "cache": "none", "limit": None},
        "model": {"name": "mlp", "hidden": [16]},
        "method": {"name": "random_epoch", "prune_ratio": 0.3},
        "train": {"epochs": EPOCHS, "batch_size": BATCH},
        "scaling": {"num_workers": workers, "cpus_per_worker": 1 if workers else "auto", "threads": 1}
        | {"stream": stream},
    }
    return train(run_config(tmp_path, name, **{**base, **sections}))


def stored_bytes(file: Path) -> int:
    """Return the compressed size of a file's column chunks."""
    footer = pq.read_metadata(file)
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    return sum(group.column(number).total_compressed_size for group in groups for number in range(group.num_columns))


@pytest.mark.parametrize(("local_workers", "workers"), [(0, 1), pytest.param(2, 2, marks=pytest.mark.scenario)])
def test_both_transports_give_the_same_run_and_count_the_bytes_read(
    tmp_path: Path, digits: Path, local_workers: int, workers: int
) -> None:
    local = group_run(tmp_path, digits, "local", local_workers, "local")
    streamed = group_run(tmp_path, digits, "streamed", workers, "auto")
    assert_same_run(streamed, local)
    source = open_data("parquet", path=str(digits), cache="none").train
    assert len(source.groups) == 21
    for epoch, line in enumerate(local.metrics):
        window_rows = block_rows(source.schema.row_bytes)
        selection = read_selection(local.folder, epoch)
        assert (
            line["plan_hash"]
            == Plan.of_selection(selection, BATCH, 0, epoch, groups=source.groups, window_rows=window_rows).hash
        )
    # Each process reads every group once in the run, as the data fits into the buffer.
    once = stored_bytes(digits / "train.parquet") + stored_bytes(digits / "test.parquet")
    assert [line["bytes_read"] for line in local.metrics] == [workers * once] * EPOCHS
    # Ray chooses the process that reads a block.
    assert all(once <= line["bytes_read"] <= workers * EPOCHS * once for line in streamed.metrics)


def test_a_small_buffer_costs_only_more_reads(tmp_path: Path, digits: Path) -> None:
    data = {"source": "parquet", "path": str(digits), "cache": "none", "limit": None}
    kept = group_run(tmp_path, digits, "kept", 0, "local")
    read_again = group_run(tmp_path, digits, "again", 0, "local", data={**data, "buffer_bytes": 0})
    assert_same_run(read_again, kept)
    once = stored_bytes(digits / "train.parquet") + stored_bytes(digits / "test.parquet")
    assert [line["bytes_read"] for line in read_again.metrics] == [once, 2 * once]
    assert [line["bytes_read"] for line in kept.metrics] == [once, once]


@pytest.mark.parametrize(("cache", "cure"), [("disk", "data.cache=none"), ("none", "data.cache=disk")])
def test_a_run_continues_only_in_its_own_order(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, cache: str, cure: str
) -> None:
    monkeypatch.setenv("RAYPRUNE_CACHE", str(tmp_path / "cache"))
    data = {"source": "parquet", "path": str(digits), "limit": None}
    before = "none" if cache == "disk" else "disk"
    group_run(tmp_path, digits, "run", 0, "local", data={**data, "cache": before})
    with pytest.raises(ValueError, match=f"of a run shuffled .*, this one would be .*: set {cure}"):
        group_run(tmp_path, digits, "run", 0, "local", data={**data, "cache": cache})
    again = group_run(tmp_path, digits, "run", 0, "local", data={**data, "cache": before})
    assert len(again.metrics) == EPOCHS
