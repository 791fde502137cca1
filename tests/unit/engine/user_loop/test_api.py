"""local_loader: its arguments, custom methods, and integers from NumPy."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import rayprune
from rayprune.engine.user_loop.api import PrunedData
from tests.unit.engine.user_loop.loops import Loop, N, X, local_shard


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size 0 must be"),
        ({"num_epochs": 0}, "num_epochs 0"),
        ({"method": "infobatch"}, "method must be a rayprune method"),
        ({"method": rayprune.InfoBatch}, "method must be a rayprune method"),
        ({"method": rayprune.InfoBatch(class_floor=0.2), "source": {"x": X}}, "no integer column 'label'"),
        ({"last_batch": "keep"}, "'pad' or 'drop'"),
        ({"last_batch": "drop", "batch_size": 512}, "more than the 301 samples"),
        ({"batch_size": 302}, "batch_size 302 is more than the 301 samples"),
        ({"source": {"x": X, "y": X[:3]}}, "one length.*: give each a row per sample"),
        ({"source": {"x": X, "id": np.arange(N)}}, "a name that rayprune adds itself"),
        ({"source": {"x": [1, "a"]}}, "column 'x' has numbers in some rows and str in others"),
        ({"source": {"x": [[1], [1, 2]]}, "stream": "device"}, "column 'x' is ragged, .*: use stream local, with a"),
        ({"label_column": "kind"}, "no column 'kind' for label_column"),
        ({"image_size": 3}, "a mapping of columns takes no option 'image_size': it takes label_column"),
        ({"source": {"x": torch.zeros(3, dtype=torch.bfloat16)}}, "column 'x' is not an array"),
        ({"source": {}}, "no columns"),
        ({"source": {"x": X[:0]}}, "no rows"),
    ],
)
def test_a_bad_argument_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        local_shard(**changes)
    assert "\n" not in str(caught.value)


def test_a_custom_method_needs_no_registered_name() -> None:
    @dataclass(frozen=True)
    class Half(rayprune.Method):
        signals = ()

        def select(self, table: Any, context: Any) -> Any:
            return rayprune.Selection.of_ids(np.arange(0, context.num_samples, 2), context.num_samples)

    shard = local_shard(method=Half(), num_epochs=2)
    for epoch in shard.epochs():
        assert epoch.num_kept == 151
        for batch in epoch.iter_torch_batches():
            epoch.weigh(batch, batch["x"].sum(1))


def test_numpy_integers_are_accepted_and_saved_as_integers(tmp_path: Path) -> None:
    shard = local_shard(seed=np.int64(3), num_epochs=np.int64(2), batch_size=np.int64(32))
    loop = Loop(shard)
    loop.run((0, 2), lambda: torch.save(shard.state_dict(), tmp_path / "state.pt"))
    again = local_shard(seed=3, num_epochs=2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert next(again.epochs()).start_step == 2


def test_a_batch_size_that_the_workers_cannot_share_is_refused_before_ray_starts() -> None:
    import ray

    running = ray.is_initialized()
    with pytest.raises(ValueError, match=r"batch_size 32 is not a multiple of 3 workers: give prune\(batch_size=33\)"):
        rayprune.prune({"x": X}, rayprune.Full(), num_epochs=1, batch_size=32, world_size=3)
    assert ray.is_initialized() == running


def test_methods_of_a_dataset_are_those_of_the_pruned_dataset() -> None:
    pruned = PrunedData(None, cast(Any, None), 8, "")
    with pytest.raises(AttributeError, match=r"no attribute 'map_batches': use pruned\.dataset\.map_batches"):
        pruned.map_batches(lambda batch: batch)
    assert not hasattr(pruned, "nothing")
    assert pickle.loads(pickle.dumps(pruned)).num_samples == 8
