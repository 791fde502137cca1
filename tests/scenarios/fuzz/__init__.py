"""Fuzzing: the real commands on configs, data and run folders that are damaged at random."""
