"""Images <-> latents of about unit variance, by Stable Diffusion 3's autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

__all__ = ["decode_latents", "encode_latents"]


def encode_latents(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Return latents float32 [B, 16, H/8, W/8], the posterior's mean.

    Images are float [B, 3, H, W] in [-1, 1], with sides that are multiples of 8.
    """
    encoded = autoencoder.encode(images.to(autoencoder.dtype)).latent_dist.mode()
    shift, scale = _normalisation(autoencoder)
    return (encoded.float() - shift) * scale


def decode_latents(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return images float32 [B, 3, 8h, 8w], nominally in [-1, 1], of latents [B, 16, h, w]."""
    shift, scale = _normalisation(autoencoder)
    latents = (latents / scale + shift).to(autoencoder.dtype)
    parts = [autoencoder.decode(part, return_dict=False)[0] for part in latents.split(1)]
    return torch.cat(parts).float()


def _normalisation(autoencoder: AutoencoderKL) -> tuple[float, float]:
    """Return the shift and scale from the autoencoder's own latents to unit variance."""
    config = autoencoder.config
    return config["shift_factor"] or 0.0, config["scaling_factor"]
