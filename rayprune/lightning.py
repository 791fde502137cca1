"""Selection in Lightning; needs `pip install 'rayprune[lightning]'`."""

from rayprune.trainers.needs import needs

with needs("lightning"):
    from rayprune.trainers.lightning import PruneCallback

__all__ = ["PruneCallback"]
