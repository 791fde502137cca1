"""The torch side of the engine, without Ray: models, train steps, per-sample signals, augmentation, optimizers."""
