"""Selection in Accelerate; needs `pip install 'rayprune[accelerate]'`."""

from rayprune.trainers.needs import needs

with needs("accelerate"):
    from rayprune.trainers.accelerate import PrunedLoader

__all__ = ["PrunedLoader"]
