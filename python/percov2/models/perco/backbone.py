"""The backbone "perco": PerCo (SD v2.1), arXiv 2310.10325 on Stable Diffusion 2.1, imported.

Stable Diffusion's U-Net reads the noisy latents, z_hat and the CLIP embedding of the caption. It
predicts the velocity, and DDIM samples. Autoencoder, text encoder, tokenizer and scheduler belong
to the base model; the folder has one U-Net per rate. Compressing loads no U-Net and no text
encoder; decompressing loads no hyper-encoder. docs/reference/perco.md has the facts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from percov2.caching import remembered
from percov2.models.backbone import BackboneOptions
from percov2.models.config import LATENT_SIDE
from percov2.models.torch.backbone import TorchBackbone
from percov2.models.torch.flow import WindowedEstimate, upsample_z_hat
from percov2.models.torch.hyper_encoder import HyperEncoder, load_hyper_encoder
from percov2.models.torch.placement import Placement, base_location, load_part

__all__ = ["PerCoModel"]


class PerCoModel(TorchBackbone):
    """The float networks of an imported folder and of its base model.

    The folder holds config.json and, per rate, hyper_encoder/, quantizer/ and unet/. Its ``base``
    has the layout of Stable Diffusion 2.1, with weights as safetensors; ValueError unless it is a
    folder or a possible hub id. Autoencoder, hyper-encoder and quantizer always run as float32.
    """

    def __init__(self, folder: Path, device: str, options: BackboneOptions) -> None:
        super().__init__(folder, device)
        self.options = options
        self.place = Placement.of(device, options)
        self._base = base_location(self.folder, self.config.base)
        # Two U-Nets would need twice the memory, and a batch has one rate.
        self._unet = remembered(self._load_unet, 1)

    @cached_property
    def autoencoder(self) -> AutoencoderKL:
        """Return Stable Diffusion's autoencoder."""
        vae = load_part(AutoencoderKL, self._base, "vae", use_safetensors=True)
        if self.options.vae_tiling:
            vae.enable_tiling()
        return self.place.settle(vae.float())

    @cached_property
    def scheduler(self) -> DDIMScheduler:
        """Return DDIM with the base model's noise schedule; ValueError if it does not predict v."""
        scheduler = load_part(DDIMScheduler, self._base, "scheduler")
        prediction = scheduler.config.prediction_type
        if prediction != "v_prediction":
            raise ValueError(
                f"base model {self._base}: its networks predict {prediction!r}, but PerCo's "
                f"predict v; set base in {self.folder / 'config.json'} to Stable Diffusion 2.1 "
                "(for 768 pixels)"
            )
        return scheduler

    @cached_property
    def tokenizer(self) -> Any:
        """Return CLIP's tokenizer."""
        from transformers import CLIPTokenizer

        return load_part(CLIPTokenizer, self._base, "tokenizer")

    @cached_property
    def text_encoder(self) -> Any:
        """Return Stable Diffusion 2.1's text encoder: CLIP's, without its last layer."""
        from transformers import CLIPTextModel

        form = {"use_safetensors": True, "dtype": self.place.dtype}
        return self.place.settle(load_part(CLIPTextModel, self._base, "text_encoder", **form))

    def _load_unet(self, rate: str) -> UNet2DConditionModel:
        folder = str(self.folder / self.config.rate(rate).name)
        form = {"use_safetensors": True, "torch_dtype": self.place.dtype}
        unet = load_part(UNet2DConditionModel, folder, "unet", **form)
        words, reads = self.text_encoder.config.hidden_size, unet.config.cross_attention_dim
        if words != reads:
            raise ValueError(
                f"base model {self._base}: its text encoder gives {words} numbers per word, but "
                f"the network of rate {rate} reads {reads}; set base in "
                f"{self.folder / 'config.json'} to Stable Diffusion 2.1"
            )
        self.place.settle(unet)
        if self.options.compile:
            unet.compile()
        return unet

    def _load_hyper_encoder(self, rate: str) -> HyperEncoder:
        point = self.config.rate(rate)
        folder = self.folder / point.name / "hyper_encoder"
        return self.place.settle(load_hyper_encoder(folder, point))

    def hyper_latents(self, images: Tensor, rate: str) -> Iterator[Tensor]:
        """Yield hyper-latents, as ``Backbone.hyper_latents``.

        The latents are the mean of the posterior (the original draws a sample).
        """
        self.token_side(images, rate)
        hyper_encoder, vae = self.hyper_encoder(rate), self.autoencoder
        with self.place.at_work(vae):
            means = [vae.encode(x).latent_dist.mode() for x in images.to(self.device).split(1)]
        with self.place.at_work(hyper_encoder):
            for mean in means:
                yield hyper_encoder(mean * vae.config.scaling_factor)

    def _words(self, captions: Sequence[str]) -> Tensor:
        """Return embeddings [B, L, d] of captions, padded and cut to CLIP's length."""
        form = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        length = self.tokenizer.model_max_length
        rows = self.tokenizer(list(captions), max_length=length, **form).input_ids
        with self.place.at_work(self.text_encoder):
            return self.text_encoder(rows.to(self.device))[0]

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

        ``steps`` counts DDIM steps, at most those of the schedule; the original takes 20. The base
        model's spacing begins at time 951 of 1000 with 20 steps, at 801 with 5, at 1 with 1.
        ``realism`` must be None: PerCo's dial is ``steps``.
        """
        self.config.chosen_realism(rate, realism)
        ratio = self.config.rate(rate).token_side // LATENT_SIDE
        height, width = tokens.shape[-2] * ratio, tokens.shape[-1] * ratio
        scheduler = self.scheduler
        most = scheduler.config.num_train_timesteps - scheduler.config.steps_offset
        if not 1 <= steps <= most:
            raise ValueError(f"steps must be 1 to {most} with this model, not {steps}")
        scheduler.set_timesteps(steps)
        z_hat = self.quantizer(rate).lookup(tokens.to(self.device))
        z_hat = upsample_z_hat(z_hat, height, width)
        words = [self._words(captions)]
        if guidance != 1.0 and any(captions):
            words.append(self._words([""] * len(captions)))
        unet, vae = self._unet(rate), self.autoencoder
        channels = int(vae.config.latent_channels)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(channels, height, width, generator=generator, dtype=torch.float32)
        x = noise.to(self.device).expand(len(tokens), -1, -1, -1)
        with self.place.at_work(unet):
            for t in scheduler.timesteps:
                velocity, *without = (self._velocity(unet, x, z_hat, t, text) for text in words)
                if without:
                    velocity = without[0] + guidance * (velocity - without[0])
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
        x = x / vae.config.scaling_factor
        with self.place.at_work(vae):
            pictures = [vae.decode(y, return_dict=False)[0] for y in x.split(1)]
        return torch.cat(pictures).clamp(-1, 1)

    def _velocity(
        self, unet: UNet2DConditionModel, x: Tensor, z_hat: Tensor, t: Tensor, text: Tensor
    ) -> Tensor:
        """Return v at time t, in overlapping windows of the training size."""

        def window(noisy: Tensor, z: Tensor, rows: Tensor) -> Tensor:
            both = torch.cat([noisy, z], 1).to(self.place.dtype)
            return unet(both, t, text[rows], return_dict=False)[0].float()

        sides = self.config.window, self.config.window
        return WindowedEstimate(window, sides, self.config.overlap)(x, z_hat)
