"""Plots of finished runs and sweeps: reads their folders only, knows neither Ray nor torch."""
