"""Data larger than memory: streaming an epoch takes a fraction of the data's size, measured in a process of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

NUM_ROWS, SIDE, GROUP_ROWS = 24_576, 64, 256
DATA_BYTES = NUM_ROWS * SIDE * SIDE * 3

STREAM = """
import re, sys
from pathlib import Path
import numpy as np
from rayprune.engine.scoring.spec import ScoreSpec
from rayprune.engine.scoring.client import ScoreClient
from rayprune.engine.scoring.messages import AttemptKey, PlanPass
from rayprune.engine.scoring.session import ScoringSession
from rayprune.engine.data.transport import LocalStream
from rayprune.sources import open_data

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

keys = {"validation_fraction": 0, "cache": "none", "buffer_bytes": 2**24}
source = open_data("parquet", path=sys.argv[1], **keys).train
size = source.schema.row_bytes
scores = ScoreClient.in_process(ScoreSpec({"name": "full"}, source, 0, 1, 0, 64, "pad", size, None, 0))
plan_pass = PlanPass(AttemptKey(1, 0), "train", 1)
session = ScoringSession(scores, 1, 0, 1)
header = scores.announce(plan_pass)
source.take(np.arange(8))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of the imports, is forgotten
before = memory("VmRSS")
seen = np.zeros(len(source), bool)
for batch in session.batches(header, LocalStream({"train": source}).batches):
    assert (batch.columns["image"][:, 0, 0, 0] == batch.ids % 251).all()
    seen[batch.ids] = True
assert seen.all()
print(memory("VmHWM") - before)
"""


def write_noise(file: Path) -> None:
    """Write incompressible images, group by group; the first value names the row."""
    rng = np.random.default_rng(0)
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for start in range(0, NUM_ROWS, GROUP_ROWS):
            images = rng.integers(0, 256, (GROUP_ROWS, SIDE, SIDE, 3), dtype=np.uint8)
            images[:, 0, 0, 0] = np.arange(start, start + GROUP_ROWS) % 251
            streams = [io.BytesIO() for _ in images]
            for pixels, stream in zip(images, streams, strict=True):
                Image.fromarray(pixels).save(stream, "BMP")
            column = pa.array([stream.getvalue() for stream in streams], pa.binary())
            writer.write_table(pa.table([column, pa.array([0, 1] * (GROUP_ROWS // 2))], schema=schema))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_an_epoch_needs_a_third_of_the_datas_size_at_most(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size > DATA_BYTES
    command = [sys.executable, "-c", STREAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert int(done.stdout) < DATA_BYTES / 3
