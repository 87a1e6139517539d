"""The embedded patch autoencoder: images <-> latents at 1/8 resolution with 16 channels.

It has only convolutions and no spatial normalisation. So a latent depends on a bounded
neighbourhood, and any image size works.
"""

from __future__ import annotations

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["PatchAutoencoder", "ResidualBlock"]


class ResidualBlock(nn.Module):
    """A residual block of two 3×3 convolutions, each after a SiLU; the second starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """A deterministic autoencoder: pixel-unshuffle by 4, then one more halving to 1/8.

    ``widths`` are the channels at 1/4 and 1/8 resolution, ``decoder_widths`` those of the decoder;
    None for the same. Residual blocks are counted at 1/4 and 1/8 in the encoder, at 1/8 and 1/4 in
    the decoder.
    """

    stride = 8

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        widths: tuple[int, int] = (96, 192),
        encoder_blocks: tuple[int, int] = (1, 1),
        decoder_blocks: tuple[int, int] = (3, 3),
        decoder_widths: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        fine, coarse = widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, fine, 3, padding=1),
            *[ResidualBlock(fine) for _ in range(encoder_blocks[0])],
            nn.Conv2d(fine, coarse, 2, stride=2),
            *[ResidualBlock(coarse) for _ in range(encoder_blocks[1])],
            nn.Conv2d(coarse, latent_channels, 1),
        )
        fine, coarse = decoder_widths or widths
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, coarse, 3, padding=1),
            *[ResidualBlock(coarse) for _ in range(decoder_blocks[0])],
            nn.Conv2d(coarse, fine * 4, 1),
            nn.PixelShuffle(2),
            *[ResidualBlock(fine) for _ in range(decoder_blocks[1])],
            nn.Conv2d(fine, 48, 3, padding=1),
            nn.PixelShuffle(4),
        )

    def encode(self, images: Tensor) -> Tensor:
        """Return latents [B, 16, H/8, W/8] of about unit variance.

        Images are float [B, 3, H, W] in [-1, 1]; ValueError unless H and W are multiples of 8.
        """
        if images.shape[-1] % self.stride or images.shape[-2] % self.stride:
            raise ValueError(
                f"picture sides must be multiples of 8, not {tuple(images.shape[-2:])}"
            )
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Return unclamped images float [B, 3, 8h, 8w], nominally in [-1, 1], of [B, 16, h, w]."""
        return self.decoder(latents)
