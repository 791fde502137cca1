"""Tools for loops in PyTorch: a learning-rate schedule for epochs of any length."""

from rayprune.nn.optim import ProgressLR, progress_lr

__all__ = ["ProgressLR", "progress_lr"]
