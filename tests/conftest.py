"""Settings of all tests: one thread per process, and hypothesis draws the same examples in every run."""

import os

from hypothesis import settings

# Two processes share two cores; torch reads this when it is imported. A config's own number of threads still counts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray Train starts this watcher as one more process per run, for nodes that a cloud takes back.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")

settings.register_profile("house", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("house")
