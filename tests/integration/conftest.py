"""One local Ray for all integration tests, with four logical CPUs: two workers and Ray Data fit on two real CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="package", autouse=True)
def cluster(ray_cluster: None) -> None:
    """Start Ray for every test; a module of which most tests need none replaces this fixture."""


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """Start Ray as `start_ray` does, but with four CPUs; stop it before other tests of this process."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(
        "local",  # never another Ray of this machine
        num_cpus=4,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
