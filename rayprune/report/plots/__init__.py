"""Plots of runs, samples and experiments."""
