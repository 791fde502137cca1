"""Comparisons of arms over paired seeds."""
