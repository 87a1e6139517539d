"""Stage 1: the autoencoder, then hyper-encoder, quantizer, flow transformer and decoder together.

The second phase follows PerCoV2 §3 (flow matching with z_hat beside the noisy latents) and adds
what a small model needs: most samples start at t = 1 and are decoded, so that L1 and LPIPS reach
the whole chain, the trainable decoder included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from percov2.models.autoencoder import PatchAutoencoder
from percov2.models.flow import build_flow, estimate_clean, upsample_z_hat
from percov2.models.hyper_encoder import HyperEncoder
from percov2.models.quantizer import VectorQuantizer
from percov2.models.text_encoder import HashedTextEncoder
from percov2.training.data import PhotoCrops
from percov2.training.loop import TrainingStage
from percov2.training.losses import ReconstructionLoss


@dataclass(frozen=True)
class CropPlan:
    """Crop sides and how many crops of each side make a batch; one side is drawn per step."""

    sides: tuple[int, ...] = (128, 192, 256)
    counts: tuple[int, ...] = (16, 8, 4)

    def draw(self, data: PhotoCrops, generator: np.random.Generator) -> tuple[Tensor, list[str]]:
        """A batch of crops of one side: images [B, 3, S, S] in [-1, 1], and captions."""
        pick = int(generator.integers(len(self.sides)))
        images, captions = data.batch(generator, self.counts[pick], self.sides[pick])
        return images.contiguous(memory_format=torch.channels_last), captions


def _save_rows(path: Path, rows: list[Tensor]) -> None:
    """Write rows of images [B, 3, H, W] in [-1, 1] below each other as one PNG."""
    strips = [torch.cat(list(r), 2) for r in rows]
    grid = torch.cat(strips, 1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()).save(path)


@dataclass
class AutoencoderConfig:
    """Configuration of the autoencoder phase."""

    autoencoder: dict = field(default_factory=dict)
    crops: CropPlan = field(default_factory=CropPlan)
    lpips_weight: float = 0.5
    latent_noise: float = 0.1


class AutoencoderStage(TrainingStage):
    """Phase A: images -> latents -> images, latents held near unit variance."""

    def __init__(self, config: AutoencoderConfig, data: PhotoCrops) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = PatchAutoencoder(**config.autoencoder)
        self.autoencoder.to(memory_format=torch.channels_last)
        self.loss = ReconstructionLoss(config.lpips_weight)

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`TrainingStage.forward`."""
        images, _ = self.config.crops.draw(self.data, generator)
        latents = self.autoencoder.encode(images).float()
        noisy = latents + self.config.latent_noise * torch.randn_like(latents)
        loss, figures = self.loss(self.autoencoder.decode(noisy), images)
        power = latents.square().mean((0, 2, 3))
        mean = latents.mean((0, 2, 3))
        spread = ((power - 1).square() + mean.square()).mean()
        return loss + 0.02 * spread, {**figures, "power": power.mean().detach()}

    def draw_samples(self, folder: Path, step: int) -> None:
        """Fixed crops above their reconstructions."""
        images, _ = self.data.batch(np.random.default_rng(123), 6, self.config.crops.sides[0])
        rebuilt = self.autoencoder.decode(self.autoencoder.encode(images))
        _save_rows(folder / "samples.png", [images, rebuilt])


@dataclass
class CodecConfig:
    """Configuration of the joint phase.

    Attributes:
        one_step: share of samples at t = 1; the others draw t as SD3 does (logit-normal).
        caption_dropout: share of captions replaced by "" (PerCo: 10 %).
    """

    hyper_encoder: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    flow: dict = field(default_factory=dict)
    text_encoder: dict = field(default_factory=dict)
    crops: CropPlan = field(default_factory=CropPlan)
    prediction: str = "sample"
    one_step: float = 0.75
    lpips_weight: float = 0.8
    latent_weight: float = 0.25
    vq_weight: float = 0.25
    spread_weight: float = 0.05
    caption_dropout: float = 0.1


class CodecStage(TrainingStage):
    """Phase B: tokens that the flow transformer and the decoder can use (encoder frozen)."""

    def __init__(
        self, config: CodecConfig, autoencoder: PatchAutoencoder, data: PhotoCrops
    ) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = autoencoder
        self.autoencoder.encoder.requires_grad_(False)
        self.hyper_encoder = HyperEncoder(**config.hyper_encoder)
        self.quantizer = VectorQuantizer(**config.quantizer)
        self.flow = build_flow(self.quantizer.config["output_channels"], **config.flow)
        self.flow.pos_embed.proj.reset_parameters()
        self.text_encoder = HashedTextEncoder(**config.text_encoder)
        for part in (self.autoencoder, self.hyper_encoder):
            part.to(memory_format=torch.channels_last)
        self.loss = ReconstructionLoss(config.lpips_weight)
        self._codebook_input: tuple[Tensor, Tensor] | None = None

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`TrainingStage.forward`."""
        config = self.config
        images, captions = config.crops.draw(self.data, generator)
        keep = generator.random(len(captions)) >= config.caption_dropout
        captions = [c if k else "" for c, k in zip(captions, keep, strict=True)]
        with torch.no_grad():
            latents = self.autoencoder.encode(images).float()
        quantized = self.quantizer(self.hyper_encoder(latents))
        self._codebook_input = (quantized.directions, quantized.tokens)
        count = len(latents)
        t = torch.sigmoid(torch.randn(count))
        t = 3 * t / (1 + 2 * t)
        t = torch.where(torch.arange(count) < round(config.one_step * count), 1.0, t)
        noise = torch.randn_like(latents)
        mix = t.view(-1, 1, 1, 1)
        clean = estimate_clean(
            self.flow,
            (1 - mix) * latents + mix * noise,
            upsample_z_hat(quantized.z_hat, *latents.shape[-2:]),
            t,
            self.text_encoder(captions),
            config.prediction,
        ).float()
        latent_error = (clean - latents).square().mean()
        rebuilt = self.autoencoder.decode(clean.contiguous(memory_format=torch.channels_last))
        loss, figures = self.loss(rebuilt, images)
        loss = loss + config.latent_weight * latent_error + config.vq_weight * quantized.loss
        loss = loss - config.spread_weight * quantized.spread
        used = torch.bincount(quantized.tokens.flatten().long()).gt(0).sum()
        return loss, {
            **figures,
            "latent": latent_error.detach(),
            "vq": quantized.loss.detach(),
            "spread": quantized.spread.detach(),
            "codes": used.float(),
        }

    def after_step(self) -> None:
        """Move the codebook toward this step's hyper-latents."""
        if self._codebook_input is not None:
            self.quantizer.update_codebook(*self._codebook_input)

    def reconstruct(self, images: Tensor, captions: list[str]) -> Tensor:
        """One-step reconstruction of images [B, 3, H, W] in [-1, 1], dense (training samples)."""
        latents = self.autoencoder.encode(images).float()
        z_hat = self.quantizer.lookup(self.quantizer.tokens(self.hyper_encoder(latents)))
        clean = estimate_clean(
            self.flow,
            torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)),
            upsample_z_hat(z_hat, *latents.shape[-2:]),
            torch.ones(len(latents)),
            self.text_encoder(captions),
            self.config.prediction,
        )
        return self.autoencoder.decode(clean)

    def draw_samples(self, folder: Path, step: int) -> None:
        """Fixed crops above their one-step reconstructions."""
        images, captions = self.data.batch(
            np.random.default_rng(123), 6, self.config.crops.sides[-1]
        )
        _save_rows(folder / "samples.png", [images, self.reconstruct(images, captions)])
