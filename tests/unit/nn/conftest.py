"""Every test of rayprune.nn starts from the same random state, on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
