"""The part of compressing that all backbones share: from hyper-latents to tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from percov2.models.config import ModelConfig
from percov2.models.quantizer import VectorQuantizer, load_quantizer, stored_codebook

__all__ = ["TokenMaker"]


class TokenMaker(ABC):
    """The base of all backbones, which add the hyper-latents.

    Args:
        folder: the model folder.
        device: torch device of the networks.

    Attributes:
        config: the folder's ``config.json``.
        quantizer: name of a rate -> its quantizer, loaded once.

    Raises:
        ValueError: a folder that is no model.
    """

    quantizer: Callable[[str], VectorQuantizer]

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = Path(folder), device
        self.config = ModelConfig.load(self.folder)
        self.quantizer = lru_cache(None)(self._load_quantizer)

    def _load_quantizer(self, rate: str) -> VectorQuantizer:
        point = self.config.rate(rate)
        return load_quantizer(self.folder / point.name / "quantizer", point, self.device)

    def codebook_bytes(self, rate: str) -> bytes:
        """Return the stored codebook, float32 little-endian, row after row, for the model id."""
        return stored_codebook(self.folder / self.config.rate(rate).name / "quantizer")

    def _token_side(self, images: Tensor, rate: str) -> int:
        """Return a rate's token side; ValueError unless it divides the sides of images."""
        side = self.config.rate(rate).token_side
        if images.shape[-1] % side or images.shape[-2] % side:
            raise ValueError(f"image sides must be multiples of {side}: {tuple(images.shape[-2:])}")
        return side

    @abstractmethod
    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Yield hyper-latents [1, M, H/s, W/s] of one image after the other.

        Images never share a batch: convolution libraries choose their summation order by batch
        size, and an image's tokens must not depend on its neighbours. Arguments and errors as for
        ``encode_tokens``.
        """

    @torch.inference_mode()
    def directions(self, images: Tensor, rate: str) -> Tensor:
        """Return the unit vectors before quantization, float32 [B, H/s, W/s, D].

        Arguments and errors as for ``encode_tokens``.
        """
        quantizer = self.quantizer(rate)
        return torch.cat([quantizer.directions(z) for z in self.hyper_latents(images, rate)])

    @torch.inference_mode()
    def encode_tokens(self, images: Tensor, rate: str) -> Tensor:
        """Return tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Args:
            images: float [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: H or W is not a multiple of s, or an unknown rate.
        """
        return self.quantizer(rate).nearest(self.directions(images, rate))
