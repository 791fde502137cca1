"""Settings of all tests: hypothesis draws the same examples in every run and keeps no database."""

import os

from hypothesis import settings

# Ray Train starts this watcher as one more process per run, for nodes that a cloud takes back.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

settings.register_profile("house", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("house")
