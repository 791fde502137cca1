"""Every process of every command, disturbed in every way: what the command does, and whether its result is the same.

`python -m tests.scenarios.faults` runs the matrix, or a part of it, and prints it as a table.
"""
