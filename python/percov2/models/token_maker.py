"""Hyper-latents to tokens, the same for every backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from percov2.models.quantizer import VectorQuantizer


class TokenMaker(ABC):
    """What backbones share of compressing; they say how hyper-latents are made.

    Attributes:
        quantizer: name of a rate -> its quantizer, loaded once.
    """

    quantizer: Callable[[str], VectorQuantizer]

    @abstractmethod
    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Hyper-latents [1, M, H/s, W/s] of one image after the other.

        One at a time: convolution libraries choose their summation order by batch size, and an
        image's tokens must not depend on its neighbours. Arguments and errors as for
        ``encode_tokens``.
        """

    @torch.inference_mode()
    def directions(self, images: Tensor, rate: str) -> Tensor:
        """Unit vectors float32 [B, H/s, W/s, D] of which tokens are the nearest codes.

        Arguments and errors as for ``encode_tokens``.
        """
        quantizer = self.quantizer(rate)
        return torch.cat([quantizer.directions(z) for z in self.hyper_latents(images, rate)])

    @torch.inference_mode()
    def encode_tokens(self, images: Tensor, rate: str) -> Tensor:
        """Tokens int32 [B, H/s, W/s] of images, s = the rate's token side.

        Args:
            images: float [B, 3, H, W] in [-1, 1].

        Raises:
            ValueError: when H or W is not a multiple of s, or the rate is unknown.
        """
        return self.quantizer(rate).nearest(self.directions(images, rate))
