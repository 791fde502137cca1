"""The collective operations of a train step; with one rank they return their input."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ranks:
    """The ranks that train a model together: those of its DDP wrapper, or one.

    Attributes:
        number: W.
        rank: this process's, in 0..W-1.
    """

    def __init__(self, model: nn.Module) -> None:
        distributed = isinstance(model, nn.parallel.DistributedDataParallel)
        self.number = torch.distributed.get_world_size() if distributed else 1
        self.rank = torch.distributed.get_rank() if distributed else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        if self.number == 1:
            return tensor
        total = tensor.detach().clone().contiguous()
        torch.distributed.all_reduce(total)
        return total

    def sum_each(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each tensor's sum over the ranks, in one operation; all ranks pass the same names and shapes."""
        if self.number == 1 or not tensors:
            return tensors
        flat = self.sum(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]))
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {name: part.view_as(tensor) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' rows in rank order, (W·B, …); all ranks pass the same number of rows."""
        if self.number == 1:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.number)]
        torch.distributed.all_gather(parts, tensor.detach().contiguous())
        return torch.cat(parts)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, in one operation; all ranks pass the same dtype and shapes."""
        own = list(tensors)
        if self.number == 1 or not own:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        torch.distributed.broadcast(flat, src=0)
        for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(part.view_as(tensor))
