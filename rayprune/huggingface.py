"""Selection in the Trainer of Hugging Face transformers; needs `pip install 'rayprune[huggingface]'`."""

from rayprune.trainers.example_losses import ExampleLosses
from rayprune.trainers.needs import needs

with needs("huggingface"):
    from rayprune.trainers.huggingface import PrunedTrainer
    from rayprune.trainers.sequence_scores import keep_by_score, save_scores, sequence_scores

__all__ = ["ExampleLosses", "PrunedTrainer", "keep_by_score", "save_scores", "sequence_scores"]
