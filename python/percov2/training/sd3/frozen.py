"""Frozen networks for SD3 training: autoencoder, text encoders and LPIPS.

They are not submodules of a stage. Therefore checkpoints do not hold them, and processes do not
exchange them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from percov2.models.sd3.base import SD3Folder
from percov2.models.sd3.latents import decode_latents, encode_latents
from percov2.models.sd3.text import CaptionEmbedder
from percov2.models.torch.perceptual import LPIPS

__all__ = ["FrozenNetworks"]


class FrozenNetworks:
    """The frozen networks, on the device of the base model. Each is loaded at its first use.

    ``text_width`` is the number of channels of the text sequence. With ``checkpointing``, the
    decoder's activations are recomputed in the backward pass.
    """

    def __init__(self, base: SD3Folder, text_width: int, checkpointing: bool) -> None:
        self.base, self.text_width, self.checkpointing = base, text_width, checkpointing
        self.device = torch.device(base.place.device)
        self._captions = CaptionEmbedder(base.text_networks, base.place)

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        autoencoder = self.base.autoencoder()
        if self.checkpointing:
            autoencoder.enable_gradient_checkpointing()
        return autoencoder

    @cached_property
    def _lpips(self) -> LPIPS:
        return LPIPS("alex").to(self.device)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the sequence [B, L, d] and pooled [B, p] embeddings of captions.

        An empty string means no caption.
        """
        return self._captions(captions, self.text_width)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Return the mean latents, float32 [B, 16, h, w], of images [B, 3, 8h, 8w] in [-1, 1]."""
        return encode_latents(self._autoencoder, images)

    def lpips(self, latents: Tensor, images: Tensor) -> Tensor:
        """Return the mean LPIPS (AlexNet) between decoded latents and images, with gradients."""
        with torch.no_grad():
            target = self._lpips.features(images)
        decoded = decode_latents(self._autoencoder, latents)
        return self._lpips.distance(self._lpips.features(decoded), target).mean()

    def images(self, latents: Tensor) -> Tensor:
        """Decode latents [B, 16, h, w] to float32 [B, 3, 8h, 8w], nominally in [-1, 1]."""
        return decode_latents(self._autoencoder, latents)
