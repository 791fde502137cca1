"""Pruned data for a training loop of the user's own."""
