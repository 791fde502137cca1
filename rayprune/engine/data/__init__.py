"""From a plan to batches on a device."""
