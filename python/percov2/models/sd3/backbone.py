"""The backbone "sd3": Stable Diffusion 3 with our hyper-encoder, quantizer and widened flow.

PerCoV2 (arXiv 2503.09368, §3): SD3's autoencoder gives latents; the hyper-encoder and the quantizer
turn them into tokens. Decoding samples SD3's flow on the noisy latents and z_hat, guided by the
caption. Compressing loads no flow and no text encoder; decompressing loads no hyper-encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from percov2.models.backbone import BackboneOptions
from percov2.models.config import LATENT_SIDE
from percov2.models.sd3.base import SD3Base, SD3Folder
from percov2.models.sd3.latents import decode_latents, encode_latents
from percov2.models.sd3.text import CaptionEmbedder
from percov2.models.torch.backbone import TorchBackbone
from percov2.models.torch.flow import WindowedEstimate, pad_to_patches, upsample_z_hat

__all__ = ["SD3Model", "Sampling"]

_PATCH = 2
"""Latent positions per side of a patch; latents are padded to whole patches."""
_POSITIONS_AT_ONCE = 128 * 128
"""Latent positions per sampled batch: one picture of 1024×1024 or four of 512×512."""


@dataclass(frozen=True)
class Sampling:
    """A caller's part in the sampling of pictures.

    Attributes:
        generator: source of the starting noise, on the CPU or on the model's device; None for a
            generator on the CPU that is seeded with ``seed``.
        on_step: a function that is called after every step with its index, its time and the latents
            [B, 16, h, w]. It returns the latents to go on with, and True to leave out the steps
            that remain.
    """

    generator: torch.Generator | None = None
    on_step: Callable[[int, Tensor, Tensor], tuple[Tensor, bool]] | None = None


class SD3Model(TorchBackbone):
    """The float networks of an "sd3" folder: images -> tokens, tokens -> images.

    The hyper-encoder and the quantizer run in float32, the base model in the options' dtype.

    docs/reference/sd3.md has the layout of the folder. ``base`` gives the base model's networks;
    None for those named by the folder. Raises ValueError for an impossible base, as for a folder
    that is no model.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        options: BackboneOptions | None = None,
        base: SD3Base | None = None,
    ) -> None:
        super().__init__(folder, device)
        options = options or BackboneOptions()
        self.base = base or SD3Folder(self.folder, self.config.base, device, options)
        self._captions = CaptionEmbedder(self.base.text_networks, self.base.place)
        self._sampling = Sampling()

    def with_sampling(self, sampling: Sampling) -> SD3Model:
        """Return a model with the same networks in memory that samples as told."""
        other = copy.copy(self)
        other._sampling = sampling
        return other

    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Yield hyper-latents, as ``Backbone.hyper_latents``."""
        side = self.token_side(images, rate)
        height, width = images.shape[-2:]
        hyper_encoder = self.hyper_encoder(rate)
        padded = pad_to_patches(images, _PATCH * LATENT_SIDE)
        for image in padded.to(self.device).split(1):
            hyper_latents = hyper_encoder(self.encode_latents(image))
            yield hyper_latents[..., : height // side, : width // side]

    def encode_latents(self, images: Tensor) -> Tensor:
        """Return latents of about unit variance, as ``latents.encode_latents``."""
        autoencoder = self.base.autoencoder()
        with self.base.place.at_work(autoencoder):
            return encode_latents(autoencoder, images)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Return images of latents, as ``latents.decode_latents``."""
        autoencoder = self.base.autoencoder()
        with self.base.place.at_work(autoencoder):
            return decode_latents(autoencoder, latents)

    def paint(
        self,
        tokens: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None,
    ) -> Tensor:
        """Paint images from tokens and captions, as ``reconstruct``.

        ``realism`` must be None: the dial of Stable Diffusion 3 is ``steps``.
        """
        self.config.chosen_realism(rate, realism)
        ratio = self.config.rate(rate).token_side // LATENT_SIDE
        height, width = tokens.shape[-2] * ratio, tokens.shape[-1] * ratio
        z_hat = self.quantizer(rate).lookup(tokens.to(self.device))
        z_hat = pad_to_patches(upsample_z_hat(z_hat, height, width), _PATCH)
        at_once = max(1, _POSITIONS_AT_ONCE // (z_hat.shape[-2] * z_hat.shape[-1]))
        latents = [
            self.sample(part, rate, captions[i * at_once :][:at_once], steps, guidance, seed)
            for i, part in enumerate(z_hat.split(at_once))
        ]
        images = self.decode_latents(torch.cat(latents)).clamp(-1, 1)
        return images[..., : height * LATENT_SIDE, : width * LATENT_SIDE]

    @torch.inference_mode()
    def sample(
        self,
        z_hat: Tensor,
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
    ) -> Tensor:
        """Sample clean latents float32 [B, 16, h, w] by SD3's Euler steps of the flow.

        z_hat is [B, C, h, w] on the latent grid, h and w even; the rest is as for ``reconstruct``.
        Raises ValueError for steps < 1 and for a flow that does not match z_hat.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        place, flow = self.base.place, self.base.flow(rate)
        channels, width = (int(flow.config[n]) for n in ("out_channels", "joint_attention_dim"))
        if flow.config["in_channels"] != channels + z_hat.shape[1]:
            raise ValueError(
                f"{self.folder}: the flow reads {flow.config['in_channels']} channels, but latents "
                f"and z_hat have {channels} and {z_hat.shape[1]}: they are not of one training"
            )
        texts = [self._captions(captions, width)]
        if guidance != 1.0 and any(captions):
            texts.insert(0, self._captions([""] * len(captions), width))
        z_hat = z_hat.to(flow.dtype)

        def velocity(time: Tensor, noisy: Tensor, cut: Tensor, rows: Tensor) -> Tensor:
            inputs = torch.cat([noisy.to(flow.dtype), cut], 1)
            output = flow(
                hidden_states=torch.cat([inputs] * len(texts)),
                timestep=time.expand(len(inputs) * len(texts)),
                encoder_hidden_states=torch.cat([words[rows] for words, _ in texts]),
                pooled_projections=torch.cat([pooled[rows] for _, pooled in texts]),
                return_dict=False,
            )[0]
            if len(texts) == 1:
                return output.float()
            unconditional, conditional = output.float().chunk(2)
            return unconditional + guidance * (conditional - unconditional)

        scheduler = self.base.scheduler()
        scheduler.set_timesteps(steps, device=place.device)
        generator = self._sampling.generator or torch.Generator().manual_seed(seed)
        shape = (1, channels, *z_hat.shape[-2:])
        noise = randn_tensor(shape, generator, torch.device(place.device), torch.float32)
        x = noise.expand(len(z_hat), -1, -1, -1)
        window, every_row = self.config.window, torch.arange(len(x), device=x.device)
        sides, overlap = (window, window), self.config.overlap
        with place.at_work(flow):
            for i, time in enumerate(scheduler.timesteps):
                now = partial(velocity, time)
                if max(x.shape[-2:]) <= window:  # one window needs no blending
                    estimate = now(x, z_hat, every_row)
                else:
                    blended = WindowedEstimate(now, sides, overlap, batch=1)
                    estimate = blended(x, z_hat)
                x = scheduler.step(estimate, time, x, return_dict=False)[0]
                if self._sampling.on_step is not None:
                    x, stop = self._sampling.on_step(i, time, x)
                    if stop:
                        break
        return x
