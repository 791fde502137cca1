"""Plots of finished runs, sweeps and comparisons: reads their folders only, knows neither Ray nor torch."""
