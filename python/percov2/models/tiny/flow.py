"""The flow transformer: SD3's, with its patch embedding widened for z_hat, and its sampler.

PerCoV2 (arXiv 2503.09368, §3) concatenates z_hat, nearest-upsampled to the latent grid, to the
noisy latents. Flow matching: x_t = (1 − t)·x_0 + t·noise, velocity v = noise − x_0.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from percov2.models.config import PREDICTIONS

__all__ = [
    "WindowedEstimate",
    "build_flow",
    "estimate_clean",
    "pad_to_patches",
    "sample",
    "upsample_z_hat",
    "whole_patches",
    "widen_patch_embedding",
    "window_starts",
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


def whole_patches(length: int, patch: int) -> int:
    """Round a side up to a multiple of the flow's patch side."""
    return -(-length // patch) * patch


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


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return starts of windows that cover 0 … length − 1; the last one may overlap more."""
    return [*range(0, length - window, stride), max(0, length - window)]


def _ramp(length: int, overlap: int) -> Tensor:
    """Return positive blending weights [length] that rise over ``overlap`` entries at both ends."""
    place = torch.arange(length)
    return ((torch.minimum(place, place.flip(0)) + 1) / (overlap + 1)).clamp(max=1.0)


class WindowedEstimate:
    """An estimator of clean latents of any size in overlapping windows.

    ``estimate`` maps (noisy, z_hat, index of the batch row per window), all of at most ``window`` ×
    ``window`` latent positions, to clean latents, ``batch`` windows per call, which bound the
    memory. Neighbours share ``overlap`` positions; their estimates are blended linearly.
    """

    def __init__(
        self,
        estimate: Callable[[Tensor, Tensor, Tensor], Tensor],
        window: int,
        overlap: int,
        batch: int = 8,
    ) -> None:
        if not 0 <= overlap < window:
            raise ValueError(f"overlap must lie in 0…{window - 1}, not {overlap}")
        self.estimate, self.window, self.overlap, self.batch = estimate, window, overlap, batch

    def __call__(self, noisy: Tensor, z_hat: Tensor) -> Tensor:
        """Return estimates of x_0 for noisy [B, 16, h, w] and z_hat [B, C, h, w]."""
        count, _, height, width = noisy.shape
        stride = self.window - self.overlap
        rows, columns = min(self.window, height), min(self.window, width)
        tops = window_starts(height, self.window, stride)
        lefts = window_starts(width, self.window, stride)
        places = [
            (b, slice(y, y + rows), slice(x, x + columns))
            for b, y, x in product(range(count), tops, lefts)
        ]
        weight = (_ramp(rows, self.overlap)[:, None] * _ramp(columns, self.overlap)).to(noisy)
        total = torch.zeros_like(noisy)
        norm = noisy.new_zeros(1, 1, height, width)
        for _, ys, xs in places[: len(tops) * len(lefts)]:
            norm[..., ys, xs] += weight
        for first in range(0, len(places), self.batch):
            cut = places[first : first + self.batch]
            clean = self.estimate(
                torch.stack([noisy[b, :, ys, xs] for b, ys, xs in cut]),
                torch.stack([z_hat[b, :, ys, xs] for b, ys, xs in cut]),
                torch.tensor([b for b, _, _ in cut], device=noisy.device),
            )
            for (b, ys, xs), part in zip(cut, clean, strict=True):
                total[b, :, ys, xs] += part * weight
        return total / norm


def sample(
    estimate: Callable[[Tensor, Tensor, float], Tensor],
    z_hat: Tensor,
    noise: Tensor,
    steps: int,
    shift: float = 3.0,
) -> Tensor:
    """Sample the flow by Euler steps from t = 1 to 0.

    Args:
        estimate: maps (x_t, z_hat, t) to an estimate of the clean latents (guidance included).
        z_hat, noise: [B, C, h, w] and x_1 [B, 16, h, w], on the latent grid.
        steps: number of evaluations. One returns the estimate at t = 1; ValueError for none.
        shift: SD3's timestep shift; larger spends more steps near t = 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    uniform = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    times = (shift * uniform / (1 + (shift - 1) * uniform)).tolist()
    x = noise
    for now, after in pairwise(times):
        clean = estimate(x, z_hat, now)
        x = clean + (x - clean) * (after / now)
    return x
