"""Selection in the Trainer of Hugging Face transformers; needs `pip install 'rayprune[huggingface]'`."""

from rayprune.trainers.example_losses import ExampleLosses
from rayprune.trainers.needs import needs

with needs("huggingface"):
    from rayprune.trainers.huggingface import PrunedTrainer

__all__ = ["ExampleLosses", "PrunedTrainer"]
