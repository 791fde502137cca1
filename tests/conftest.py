"""Settings of all tests: hypothesis draws the same examples on every run and keeps no database; two processes run.

A file's tests stay in one process, so that its fixtures are made once, and so do the tests that share one Ray; those
that start clusters of their own wait for Ray more than they compute.
"""

import pytest
from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("house")

_OWN_CLUSTERS = "test_elastic.py"


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a test the name of the group that it runs with; any later, and the tests are dealt out one by one."""
    shares_ray = item.path.parent.name == "integration" and item.path.name != _OWN_CLUSTERS
    item.add_marker(pytest.mark.xdist_group("ray" if shares_ray else str(item.path)))
