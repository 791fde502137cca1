"""ImageNet (Russakovsky et al., 2015, arXiv:1409.0575) as extracted: `train/` and `val/` by WordNet id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from rayprune.sources.base import Splits
from rayprune.sources.image_folder import ImageFolder
from rayprune.sources.registry import register_source
from rayprune.sources.storage import Storage, public

TRAIN, VALIDATION = "train", "val"
NUM_CHANNELS = 3


@register_source("imagenet")
@dataclass(frozen=True)
class ImageNet:
    """ImageNet, or any part of its classes: colour images, class names are the WordNet ids; `val` validates.

    Attributes:
        path: torchvision's root, local or a URI, with `train/<wnid>/` and `val/<wnid>/`.
        image_size: pixels; the shorter side is scaled to it and the middle square cut out.
        on_error, cache, cache_dir: as of `image_folder`.
        download: refused, because the archives are handed out to registered users only.
    """

    path: str
    image_size: int = 224
    on_error: str = "fail"
    cache: str = "auto"
    cache_dir: str | None = None
    download: bool = False
    default_augment: ClassVar[dict[str, Any]] = {"crop": 0, "flip": True}

    def open(self) -> Splits:
        """Open both parts as `image_folder` does.

        Raises:
            ValueError: a folder is missing, or what `image_folder` refuses.
        """
        storage = Storage(self.path)
        missing = {TRAIN, VALIDATION} - set(storage.folders() if storage.is_folder() else [])
        if missing or self.download:
            folder = (
                f"{public(storage.path).rstrip('/')}/{min(missing)} is missing" if missing else "data.download is true"
            )
            raise ValueError(
                f"{folder}: ImageNet can't be downloaded, get the archives from image-net.org and let "
                "torchvision.datasets.ImageNet extract them"
            )
        return ImageFolder(
            self.path,
            train=TRAIN,
            validation=VALIDATION,
            image_size=self.image_size,
            num_channels=NUM_CHANNELS,
            on_error=self.on_error,
            cache=self.cache,
            cache_dir=self.cache_dir,
        ).open()
