"""Data audits: suspected label errors, near-duplicates, outliers, samples that are never learned or trivially easy."""
