"""Algorithms on vectors and numbers that know nothing of methods."""
