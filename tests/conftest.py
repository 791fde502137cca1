"""Settings of all tests: hypothesis draws the same examples on every run and keeps no database."""

from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("house")
