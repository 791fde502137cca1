"""The torch side of the engine: models, losses, per-sample signals, augmentation, optimisers. Imports no Ray."""
