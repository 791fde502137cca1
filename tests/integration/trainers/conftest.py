"""These tests start no Ray, but for the module of Ray Train."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def cluster() -> None:
    """Replace the fixture that starts Ray."""
