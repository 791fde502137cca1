"""Torture: kill a run's processes and take its storage away, at seeded steps inside epochs; nothing may change.

Every disturbed run must end like one undisturbed run of the same configuration: same plans, same accuracies, same
weights and same scores, bit for bit. `python -m tests.scenarios.kills --help` says more; `test_short_torture.py` is the
short form.
"""
