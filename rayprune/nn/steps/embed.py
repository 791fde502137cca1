"""The step of a scoring run that embeds the samples with a pretrained network, and trains nothing.

Shapes: B batch, C channels, H height, W width, F features, D numbers of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rayprune.core.references import call_object, closest, is_reference, load_object
from rayprune.errors import ConfigError
from rayprune.nn.boundary import last_linear
from rayprune.nn.flops import num_macs
from rayprune.nn.steps.plain import PlainStep
from rayprune.nn.steps.registry import register_step


@register_step("embed")
class EmbedStep(PlainStep):
    """Embed the samples of a forward-only pass.

    Args:
        embedder: as `load_embedder` takes it.
        model, optimizer, **options: as for PlainStep; the network is not used.
    """

    options_class = None
    compilable = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, embedder: str, **options: Any) -> None:
        super().__init__(model, optimizer, **options)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self._name, self._embedder = embedder, load_embedder(embedder).eval().to(device)
        self._relative_cost = 0.0

    def __call__(self, inputs: Tensor, targets_B: Tensor, weights_B: Tensor) -> dict[str, Tensor]:
        raise TypeError("a scoring run with collect.embedder trains nothing")

    @torch.no_grad()
    def evaluate(
        self,
        inputs: Tensor,
        targets_B: Tensor,
        *,
        smoothed: bool,
        signals: tuple[str, ...] = (),
        part: str = "model",
    ) -> dict[str, Tensor]:
        """Return the embeddings, (B, D) float32; `loss` and `correct`, which nothing computes, are 0."""
        if not self._relative_cost:
            network = self._network.eval()
            self._relative_cost = num_macs(self._embedder, inputs[:1]) / max(1, num_macs(network, inputs[:1]))
        with self._mixed(inputs):
            embeddings = self._embedder(inputs)
        is_tensor = isinstance(embeddings, Tensor) and embeddings.ndim > 1 and embeddings.numel() > 0
        if not is_tensor or embeddings.shape[:1] != inputs.shape[:1]:
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ConfigError(
                f"collect.embedder {self._name!r} returned {got} for {inputs.shape[0]} samples: return (B, D)"
            )
        embeddings_BD = embeddings.detach().flatten(1).float()
        if faulty := int((~embeddings_BD.isfinite().all(dim=1)).sum()):
            raise ConfigError(
                f"collect.embedder {self._name!r} returned NaN or infinite numbers for {faulty} of "
                f"{inputs.shape[0]} samples: correct the network, or use another one"
            )
        zeros_B = torch.zeros(inputs.shape[0], device=embeddings.device)
        return {"loss": zeros_B, "correct": zeros_B, "embedding": embeddings_BD}

    def relative_cost(self, part: str = "model") -> float:
        """Return the embedder's multiply-adds relative to the network's."""
        return self._relative_cost or 1.0


def load_embedder(reference: str) -> nn.Module:
    """Load a pretrained network that embeds samples.

    Args:
        reference: `torchvision:NAME`, a classifier with its default weights and without its last layer; or
            `module:function` or `path.py:function`, which returns a network from (B, C, H, W) images scaled to [0, 1],
            or (B, F) features, to (B, D).

    Raises:
        ConfigError: an unknown name, weights that cannot be loaded, or a function that returns no network.
    """
    if reference.startswith("torchvision:"):
        return _TorchvisionEmbedder(reference.removeprefix("torchvision:"))
    if not is_reference(reference):
        raise ConfigError(
            f"collect.embedder {reference!r} is not a reference: write torchvision:resnet18, module:function or "
            "path.py:function"
        )
    network = call_object(f"collect.embedder {reference!r}", load_object(reference))
    if not isinstance(network, nn.Module):
        raise ConfigError(f"collect.embedder {reference!r} must return a torch.nn.Module, got {type(network).__name__}")
    return network


class _TorchvisionEmbedder(nn.Module):
    """A classifier of torchvision without its last layer, on images resized and normalized as its weights expect."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        from torchvision import models  # takes a second or more

        classifiers = models.list_models(module=models)
        if name not in classifiers:
            raise ConfigError(f"unknown torchvision model {name!r}: {closest(name, classifiers)}")
        weights = models.get_model_weights(name).DEFAULT
        preset = weights.transforms()
        try:
            self.network: nn.Module = models.get_model(name, weights=weights)
        except OSError as error:
            raise ConfigError(
                f"the weights of torchvision model {name!r} can't be downloaded ({error}): put {weights.url} into "
                "$TORCH_HOME/hub/checkpoints"
            ) from None
        self._size = preset.crop_size[0]
        for statistic in ("mean", "std"):
            self.register_buffer(statistic, torch.tensor(getattr(preset, statistic))[:, None, None], persistent=False)
        head = last_linear(self.network, torch.zeros(2, 3, self._size, self._size))
        parent, _, attribute = head.rpartition(".")
        setattr(self.network.get_submodule(parent), attribute, nn.Identity())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if images_BCHW.ndim != 4:
            raise ConfigError(
                f"a torchvision model embeds images, got inputs of shape {tuple(images_BCHW.shape)}: name another "
                "network"
            )
        images = images_BCHW.expand(-1, 3, -1, -1) if images_BCHW.shape[1] == 1 else images_BCHW
        size = (self._size, self._size)
        resized = functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        embeddings: Tensor = self.network((resized - self.mean) / self.std)
        return embeddings
