"""Tools for loops in PyTorch: a learning-rate schedule for epochs of any length, and ids for a DataLoader's batches."""

from rayprune.engine.user_loop.batch_sampler import ShardBatchSampler, WithIds
from rayprune.nn.optim import ProgressLR, progress_lr

__all__ = ["ProgressLR", "ShardBatchSampler", "WithIds", "progress_lr"]
