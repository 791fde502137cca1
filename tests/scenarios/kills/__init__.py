"""Inject faults into a run: kill its processes or take its storage away, at seeded steps inside epochs.

Every faulty run must end like one run of the same configuration without faults: same plans, accuracies, weights and
scores, bit for bit. `python -m tests.scenarios.kills --help` shows the options.
"""
