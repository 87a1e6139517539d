"""The flow transformer: SD3's, with its patch embedding widened for z_hat, in windows.

PerCoV2 (arXiv 2503.09368, §3) concatenates z_hat, nearest-upsampled to the latent grid, to the
noisy latents. Flow matching: x_t = (1 − t)·x_0 + t·noise, velocity v = noise − x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from percov2.models.config import PREDICTIONS
from percov2.models.windows import Windows

__all__ = [
    "WindowedEstimate",
    "build_flow",
    "estimate_clean",
    "pad_to_patches",
    "upsample_z_hat",
    "widen_patch_embedding",
]


def widen_patch_embedding(transformer: SD3Transformer2DModel, extra_channels: int) -> None:
    """Widen the patch embedding in place by ``extra_channels`` zero-initialised input channels.

    The widened transformer equals the original bit for bit before training. Raises ValueError for
    fewer than one extra channel.
    """
    if extra_channels < 1:
        raise ValueError(f"extra_channels must be at least 1, not {extra_channels}")
    old = transformer.pos_embed.proj
    channels = old.in_channels + extra_channels
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    transformer.pos_embed.proj = new
    transformer.register_to_config(in_channels=new.in_channels)


def build_flow(extra_channels: int, **config: Any) -> SD3Transformer2DModel:
    """Return a randomly initialised SD3 transformer, widened by ``extra_channels``."""
    transformer = SD3Transformer2DModel(**config)
    widen_patch_embedding(transformer, extra_channels)
    return transformer


def upsample_z_hat(z_hat: Tensor, height: int, width: int) -> Tensor:
    """Upsample z_hat [B, C, h', w'] to the nearest values on the latent grid [B, C, height, width].

    Raises ValueError if the latent grid is not a multiple of the token grid.
    """
    rows, columns = z_hat.shape[-2:]
    if height % rows or width % columns or height // rows != width // columns:
        raise ValueError(f"latents {height}x{width} do not match a token grid {rows}x{columns}")
    ratio = height // rows
    spread = z_hat[..., :, None, :, None].expand(*z_hat.shape[:-1], ratio, columns, ratio)
    return spread.reshape(*z_hat.shape[:-2], height, width)


def pad_to_patches(z_hat: Tensor, patch: int) -> Tensor:
    """Repeat the last row and column of z_hat [B, C, h, w] until the patches divide its sides."""
    height, width = z_hat.shape[-2:]
    return F.pad(z_hat, (0, -width % patch, 0, -height % patch), mode="replicate")


def estimate_clean(
    transformer: SD3Transformer2DModel,
    noisy: Tensor,
    z_hat: Tensor,
    t: Tensor,
    text: tuple[Tensor, Tensor],
    prediction: str,
) -> Tensor:
    """Return a one-step estimate of the clean latents x_0.

    Args:
        noisy, z_hat: x_t [B, 16, h, w] and [B, C, h, w], both on the latent grid.
        t: [B] in [0, 1].
        text: sequence [B, L, d] and pooled [B, p] embeddings.
        prediction: "velocity" (SD3: x_0 = x_t − t·v) or "sample" (the network returns x_0, so a
            small model need not reproduce the noise); ValueError for another one.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
    output = transformer(
        hidden_states=torch.cat([noisy, z_hat.to(noisy.dtype)], 1),
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        timestep=t * 1000,
        return_dict=False,
    )[0]
    return output if prediction == "sample" else noisy - t.view(-1, 1, 1, 1).to(noisy) * output


class WindowedEstimate:
    """An estimator of clean latents of any size in overlapping windows.

    ``estimate`` maps (noisy, z_hat, index of the batch row per window), all of at most ``windows``
    latent positions (rows, columns), to clean latents, ``batch`` windows per call, which bound the
    memory. Neighbours share ``overlap`` positions; their estimates are blended linearly.
    """

    def __init__(
        self,
        estimate: Callable[[Tensor, Tensor, Tensor], Tensor],
        windows: tuple[int, int],
        overlap: int,
        batch: int = 8,
    ) -> None:
        self.estimate, self.windows, self.overlap, self.batch = estimate, windows, overlap, batch

    def __call__(self, noisy: Tensor, z_hat: Tensor) -> Tensor:
        """Return estimates of x_0 for noisy [B, 16, h, w] and z_hat [B, C, h, w]."""
        count, _, height, width = noisy.shape
        windows = Windows.covering((height, width), self.windows, self.overlap)
        weight = torch.from_numpy(windows.weight).to(noisy)
        total = torch.zeros_like(noisy)
        cuts = [(b, ys, xs) for b in range(count) for ys, xs in windows.places]
        for first in range(0, len(cuts), self.batch):
            cut = cuts[first : first + self.batch]
            clean = self.estimate(
                torch.stack([noisy[b, :, ys, xs] for b, ys, xs in cut]),
                torch.stack([z_hat[b, :, ys, xs] for b, ys, xs in cut]),
                torch.tensor([b for b, _, _ in cut], device=noisy.device),
            )
            for (b, ys, xs), part in zip(cut, clean, strict=True):
                total[b, :, ys, xs] += part * weight
        return total / torch.from_numpy(windows.norm).to(noisy)
