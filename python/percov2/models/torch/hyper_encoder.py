"""Hyper-encoder: latents -> hyper-latents, one vector per token (PerCo, arXiv 2310.10325, App. A).

It has three groups of residual bottlenecks with strided convolutions between them, and
CompressAI-style attention blocks (convolutional gates, Cheng et al. 2020). Any grid size works.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from percov2.models.config import LATENT_SIDE, Rate
from percov2.models.torch.storage import load_component

__all__ = ["AttentionBlock", "HyperEncoder", "load_hyper_encoder"]

_STRIDES = (1, 2, 4, 8)


class _ResidualBottleneck(nn.Module):
    """x + (1×1 -> 3×3 -> 1×1) with ReLU between, at half the channels.

    With ``rectified``, a last ReLU: the residual unit inside CompressAI's attention.
    """

    def __init__(self, channels: int, rectified: bool = False) -> None:
        super().__init__()
        self.rectified, half = rectified, channels // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        x = x + self.body(x)
        return F.relu(x) if self.rectified else x


class AttentionBlock(nn.Module):
    """x + trunk(x) · sigmoid(mask(x)): the convolutional attention of Cheng et al. 2020.

    With ``rectified``, a ReLU follows each residual unit, as in CompressAI.
    """

    def __init__(self, channels: int, rectified: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*[_ResidualBottleneck(channels, rectified) for _ in range(3)])
        parts = [_ResidualBottleneck(channels, rectified) for _ in range(3)]
        self.mask = nn.Sequential(*parts, nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to the same shape."""
        return x + self.trunk(x) * torch.sigmoid(self.mask(x))


class HyperEncoder(ModelMixin, ConfigMixin):
    """A network from latents [B, 16, h, w] to hyper-latents [B, M, h/s, w/s].

    Args:
        channels, hyper_channels: N and M of the paper (192 and 320 there).
        stride: s, latent positions per token side: 1, 2 (16-pixel tokens), 4 or 8; ValueError for
            others.
        rectified_attention: a ReLU after each residual unit of the attention blocks, as in
            CompressAI and PerCo's published weights; the embedded model has none.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        channels: int = 192,
        hyper_channels: int = 320,
        stride: int = 2,
        rectified_attention: bool = False,
    ) -> None:
        super().__init__()
        if stride not in _STRIDES:
            raise ValueError(f"stride must be one of {_STRIDES}, not {stride}")

        def step(inputs: int, halve: bool) -> nn.Conv2d:
            kernel, stride, padding = (5, 2, 2) if halve else (1, 1, 0)
            return nn.Conv2d(inputs, channels, kernel, stride, padding)

        def bottlenecks() -> list[nn.Module]:
            return [_ResidualBottleneck(channels) for _ in range(3)]

        self.body = nn.Sequential(
            step(latent_channels, stride >= 8),
            *bottlenecks(),
            step(channels, stride >= 4),
            *bottlenecks(),
            AttentionBlock(channels, rectified_attention),
            step(channels, stride >= 2),
            *bottlenecks(),
            nn.Conv2d(channels, hyper_channels, 1),
            AttentionBlock(hyper_channels, rectified_attention),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Return hyper-latents [B, M, h/s, w/s] of latents [B, 16, h, w]; s divides h and w."""
        return self.body(latents)


def load_hyper_encoder(folder: Path, rate: Rate, device: str = "cpu") -> HyperEncoder:
    """Load the hyper-encoder of a rate; ValueError if damaged or for another token side."""
    model = load_component(HyperEncoder, folder, device)
    side = LATENT_SIDE * int(model.config["stride"])
    if side != rate.token_side:
        raise ValueError(
            f"{folder} makes tokens of {side} pixels a side, but rate {rate.name} has "
            f"{rate.token_side}: config.json or the folder belongs to another model"
        )
    return model
