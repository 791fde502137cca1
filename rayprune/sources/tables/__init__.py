"""Files with a row per sample: scores, selections, audits, and logged trajectories."""
