"""Stage 1: the autoencoder, then hyper-encoder, quantizer, flow transformer and decoder together.

The second phase follows PerCoV2 §3 (flow matching with z_hat beside the noisy latents) and adds
what a small model needs: most samples start at t = 1 and are decoded, so that L1 and LPIPS reach
the whole chain, the trainable decoder included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from percov2.models.autoencoder import PatchAutoencoder
from percov2.models.flow import build_flow, estimate_clean, upsample_z_hat
from percov2.models.quantizer import Quantized
from percov2.models.text_encoder import HashedTextEncoder
from percov2.training.adversary import Adversary, AdversaryConfig
from percov2.training.data import CropPlan, PhotoCrops
from percov2.training.losses import ReconstructionLoss, View, draw_view
from percov2.training.rates import RateConfig, RateNetworks, build_rates, draw_rate
from percov2.training.stage import Draw, Place, TrainingStage


def save_rows(path: Path, rows: list[Tensor]) -> None:
    """Write rows of images [B, 3, H, W] in [-1, 1] below each other as one PNG."""
    strips = [torch.cat(list(r), 2) for r in rows]
    grid = torch.cat(strips, 1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    Image.fromarray(grid.permute(1, 2, 0).contiguous().cpu().numpy()).save(path)


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

    def start_run(self, place: Place) -> None:
        """See :meth:`TrainingStage.start_run`."""
        self.data = self.data.on(place.device)

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`TrainingStage.forward`."""
        images, _ = self.config.crops.draw(self.data, generator)
        latents = self.autoencoder.encode(images).float()
        noisy = latents + self.config.latent_noise * torch.randn_like(latents)
        loss, figures = self.loss(self.autoencoder.decode(noisy), images, draw_view(0.0, 0.0))
        power = latents.square().mean((0, 2, 3))
        mean = latents.mean((0, 2, 3))
        spread = ((power - 1).square() + mean.square()).mean()
        return loss + 0.02 * spread, {**figures, "power": power.mean().detach()}

    def draw_samples(self, folder: Path, step: int) -> None:
        """Fixed crops above their reconstructions."""
        images, _ = self.data.batch(np.random.default_rng(123), 6, self.config.crops.sides[0])
        rebuilt = self.autoencoder.decode(self.autoencoder.encode(images))
        save_rows(folder / "samples.png", [images, rebuilt])


@dataclass
class CodecConfig:
    """Configuration of the joint phase.

    Attributes:
        rates: settings per rate, in the order of the rates in a model folder.
        one_step: share of samples at t = 1; the others draw t as SD3 does (logit-normal).
        frozen_tokens: hyper-encoders and codebooks stay as they are, so that files and entropy
            models keep their meaning while flow and decoder improve.
        caption_dropout: share of captions replaced by "" (PerCo: 10 %).
        texture_weight: of the texture distance (``losses.texture_distance``).
        aligned: share of the batches whose LPIPS is taken at the tokens' own phase
            (``losses.View``).
        decoder_noise: standard deviation of the noise on the latents that are decoded.
        adversary: the patch discriminator; there is none by default.
    """

    rates: dict[str, RateConfig] = field(default_factory=dict)
    flow: dict = field(default_factory=dict)
    text_encoder: dict = field(default_factory=dict)
    prediction: str = "sample"
    one_step: float = 0.75
    lpips_weight: float = 0.8
    texture_weight: float = 0.0
    aligned: float = 0.0
    decoder_noise: float = 0.0
    latent_weight: float = 0.25
    vq_weight: float = 0.25
    spread_weight: float = 0.05
    frozen_tokens: bool = False
    caption_dropout: float = 0.1
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)


class CodecStage(TrainingStage):
    """Phase B: tokens that the flow transformer and the decoder can use (encoder frozen).

    Every step trains one rate, drawn by its share.
    """

    def __init__(
        self, config: CodecConfig, autoencoder: PatchAutoencoder, data: PhotoCrops
    ) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = autoencoder
        self.autoencoder.encoder.requires_grad_(False)
        self.rates = build_rates(config.rates, config.frozen_tokens)
        channels = int(self._rate(next(iter(self.rates))).quantizer.config["output_channels"])
        self.flow = build_flow(channels, **config.flow)
        self.flow.pos_embed.proj.reset_parameters()
        self.text_encoder = HashedTextEncoder(**config.text_encoder)
        self.autoencoder.to(memory_format=torch.channels_last)
        self.loss = ReconstructionLoss(config.lpips_weight, config.texture_weight)
        self.adversary = Adversary(config.adversary) if config.adversary.weight else None
        self._weight = 0.0
        # Scalars at one place each, which recorded steps read and write.
        self._force = torch.zeros(())
        self._discriminator_loss = torch.tensor(math.nan)

    def start_run(self, place: Place) -> None:
        """See :meth:`TrainingStage.start_run`."""
        self.data = self.data.on(place.device)
        self._force = self._force.to(place.device)
        self._discriminator_loss = self._discriminator_loss.to(place.device)
        if self.adversary is not None:
            self.adversary.start_run(place)

    def _rate(self, name: str) -> RateNetworks:
        networks = self.rates[name]
        assert isinstance(networks, RateNetworks)
        return networks

    def start_step(self, step: int, total: int) -> None:
        """See :meth:`TrainingStage.start_step`."""
        self._weight = 0.0 if self.adversary is None else self.adversary.weight(step)
        self._force.fill_(self._weight)

    @property
    def recordable(self) -> bool:  # type: ignore[override]
        """With frozen tokens, and no discriminator of features, whose shifts are drawn inside."""
        features = self.adversary is not None and self.config.adversary.network == "features"
        return self.config.frozen_tokens and not features

    def draw(self, generator: np.random.Generator) -> Draw:
        """Crops, words and times of a step, its rate, and what its losses see.

        See :meth:`TrainingStage.draw`.
        """
        config = self.config
        name = draw_rate(config.rates, generator)
        rate = config.rates[name]
        images, captions = rate.crops.draw(self.data, generator)
        keep = generator.random(len(captions)) >= config.caption_dropout
        captions = [c if k else "" for c, k in zip(captions, keep, strict=True)]
        t = torch.sigmoid(torch.randn(len(captions)))
        t = 3 * t / (1 + 2 * t)
        t[: round(config.one_step * len(captions))] = 1.0
        aligned = config.aligned if rate.aligned is None else rate.aligned
        view = draw_view(aligned, rate.coarse)
        tensors = {"words": self.text_encoder.rows(captions), "t": t}
        if view.shift is not None:
            tensors["shift"] = view.shift
        tensors = {k: v.to(images.device, non_blocking=True) for k, v in tensors.items()}
        return Draw((name, view.coarse, self._weight > 0), {**tensors, "images": images})

    def compute(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`TrainingStage.compute`."""
        config = self.config
        assert isinstance(draw.kind, tuple)
        name, coarse, felt = draw.kind
        networks, rate = self._rate(name), config.rates[name]
        images, t = draw.tensors["images"], draw.tensors["t"]
        with torch.no_grad():
            latents = self.autoencoder.encode(images).float()
        quantized: Quantized = networks(latents)
        noise = torch.randn_like(latents)
        mix = t.view(-1, 1, 1, 1)
        clean = estimate_clean(
            self.flow,
            (1 - mix) * latents + mix * noise,
            upsample_z_hat(quantized.z_hat, *latents.shape[-2:]),
            t,
            self.text_encoder.embed(draw.tensors["words"]),
            config.prediction,
        ).float()
        latent_error = (clean - latents).square().mean()
        if config.decoder_noise:
            clean = clean + config.decoder_noise * torch.randn_like(clean)
        clean = clean.contiguous(memory_format=torch.channels_last)
        rebuilt = self.autoencoder.decode(clean)
        loss, figures = self.loss(
            rebuilt,
            images,
            View(draw.tensors.get("shift"), coarse),
            rate.lpips_weight,
            rate.texture_weight,
        )
        loss = loss + config.latent_weight * latent_error + config.vq_weight * quantized.loss
        loss = loss - config.spread_weight * quantized.spread
        adversarial = None
        if felt:
            adversarial = self._adversarial(clean, rebuilt, images, rate.adversarial)
            loss = loss + adversarial
        return loss, self._figures(
            name,
            adversarial,
            {
                **figures,
                "latent": latent_error.detach(),
                "vq": quantized.loss.detach(),
                "spread": quantized.spread.detach(),
                "codes": networks.codes_in_use(),
            },
        )

    def _adversarial(self, clean: Tensor, rebuilt: Tensor, images: Tensor, factor: float) -> Tensor:
        assert self.adversary is not None
        if self.config.adversary.reach == "decoder":
            rebuilt = self.autoencoder.decode(clean.detach())
        return self.adversary.loss(rebuilt, images, factor * self._force)

    def _figures(
        self, rate: str, adversarial: Tensor | None, figures: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Figures of a step under the names of its rate, NaN for the other rates'."""
        missing = torch.tensor(math.nan)
        named = {f"{key}_{name}": missing for name in self.rates for key in figures}
        named.update({f"{key}_{rate}": value for key, value in figures.items()})
        named["adversarial"] = missing if adversarial is None else adversarial.detach()
        # The discriminator learns after the step, so its loss is that of the step before.
        named["discriminator"] = self._discriminator_loss.clone()
        return named

    def after_step(self) -> None:
        """Move the codebook of this step's rate, and let the discriminator learn."""
        for name in self.rates:
            self._rate(name).move_codebook()
        if self.adversary is not None:
            loss = self.adversary.learn()
            if loss is None:
                self._discriminator_loss.fill_(math.nan)
            else:
                self._discriminator_loss.copy_(loss)

    def side_state(self) -> dict[str, Any]:
        """See :meth:`TrainingStage.side_state`."""
        return {} if self.adversary is None else {"adversary": self.adversary.state_dict()}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """See :meth:`TrainingStage.load_side_state`; a discriminator may join a run late."""
        if self.adversary is not None and "adversary" in state:
            self.adversary.load_state_dict(state["adversary"])

    def reconstruct(self, images: Tensor, captions: list[str], rate: str) -> Tensor:
        """One-step reconstruction of images [B, 3, H, W] in [-1, 1], dense (training samples)."""
        networks = self._rate(rate)
        latents = self.autoencoder.encode(images).float()
        generator = torch.Generator().manual_seed(0)
        noise, grain = torch.randn(2, *latents.shape, generator=generator).to(latents)
        tokens = networks.quantizer.tokens(networks.hyper_encoder(latents))
        clean = estimate_clean(
            self.flow,
            noise,
            upsample_z_hat(networks.quantizer.lookup(tokens), *latents.shape[-2:]),
            torch.ones(len(latents), device=latents.device),
            self.text_encoder(captions),
            self.config.prediction,
        )
        return self.autoencoder.decode(clean + self.config.decoder_noise * grain)

    def draw_samples(self, folder: Path, step: int) -> None:
        """Fixed crops above their one-step reconstructions, one row per rate."""
        # The largest crop side that every rate's tokens divide.
        unit = max(self._rate(name).token_side for name in self.rates)
        side = max(max(rate.crops.sides) for rate in self.config.rates.values())
        images, captions = self.data.batch(np.random.default_rng(123), 6, side - side % unit)
        rebuilt = [self.reconstruct(images, captions, name) for name in self.rates]
        save_rows(folder / "samples.png", [images, *rebuilt])
