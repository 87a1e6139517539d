"""Joint phase of stage 1: hyper-encoders, quantizers, flow transformer and decoder.

It follows PerCoV2 §3 (flow matching with z_hat beside the noisy latents). In addition, most samples
start at t = 1 and are decoded. So L1 and LPIPS train the whole chain, including the decoder, which
a small model needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from percov2.models.quantizer import Quantized
from percov2.models.tiny.autoencoder import PatchAutoencoder
from percov2.models.tiny.dial import RealismDial
from percov2.models.tiny.flow import build_flow, estimate_clean, upsample_z_hat
from percov2.models.tiny.text_encoder import HashedTextEncoder
from percov2.photos import PhotoCrops
from percov2.training.adversary import (
    Adversary,
    AdversaryConfig,
    FeatureDiscriminator,
    PixelDiscriminator,
    with_force,
)
from percov2.training.autoencoder_stage import save_rows
from percov2.training.losses import (
    FEATURE_CHANNELS,
    FEATURES,
    PerceptualNetworks,
    View,
    draw_view,
    weighted,
)
from percov2.training.rates import RateConfig, RateNetworks, build_rates, draw_rate
from percov2.training.stage import Draw, Place, TrainingStage

__all__ = ["CodecConfig", "CodecStage"]


@dataclass
class CodecConfig:
    """Configuration of the joint phase.

    Attributes:
        rates: settings per rate, in the order of the rates in a model folder.
        one_step: share of samples at t = 1; the others draw t as in SD3 (logit-normal).
        distil: weight of the mean absolute difference to the pictures of the starting model's
            decoder. Above 0, only the decoder learns.
        caption_dropout: share of captions replaced by "" (PerCo: 10 %).
        decoder_noise: standard deviation of the noise on decoded latents at realism 1; it is
            proportional to realism. A rate may have its own.
        dial: settings of the realism dial; None for a model without one, trained at realism 1.
        realism_ends: shares of the samples at realism 0 and at realism 1; the others are uniform
            between them.
        window: largest side in pixels for VGG16 (``losses.draw_view``).
        adversary: settings of the discriminators.
    """

    rates: dict[str, RateConfig] = field(default_factory=dict)
    flow: dict = field(default_factory=dict)
    text_encoder: dict = field(default_factory=dict)
    prediction: str = "sample"
    one_step: float = 0.75
    decoder_noise: float = 0.0
    dial: dict | None = None
    realism_ends: tuple[float, float] = (0.15, 0.45)
    window: int = 96
    latent_weight: float = 0.25
    vq_weight: float = 0.25
    spread_weight: float = 0.05
    distil: float = 0.0
    caption_dropout: float = 0.1
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)

    def __post_init__(self) -> None:
        zero, one = self.realism_ends
        if not (zero >= 0 and one >= 0 and zero + one <= 1):
            raise ValueError(
                f"realism_ends must be two shares with a sum of at most 1, not {self.realism_ends}"
            )

    def draw_realism(self, count: int) -> Tensor:
        """Draw β of ``count`` samples, float [count]."""
        if self.dial is None:
            return torch.ones(count)
        zero, one = self.realism_ends
        between = max(1 - zero - one, 1e-6)
        return ((torch.rand(count) - zero) / between).clamp(0, 1)


class CodecStage(TrainingStage):
    """Phase B: joint training with a frozen encoder; every step draws one rate by its share."""

    def __init__(
        self, config: CodecConfig, autoencoder: PatchAutoencoder, data: PhotoCrops
    ) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = autoencoder
        self.autoencoder.encoder.requires_grad_(False)
        self.rates = build_rates(config.rates)
        channels = int(self._rate(next(iter(self.rates))).quantizer.config["output_channels"])
        self.flow = build_flow(channels, **config.flow)
        self.flow.pos_embed.proj.reset_parameters()
        self.text_encoder = HashedTextEncoder(**config.text_encoder)
        self.autoencoder.to(memory_format=torch.channels_last)
        pooled = int(self.flow.config["pooled_projection_dim"])
        self.dial = None if config.dial is None else RealismDial(**config.dial, pooled=pooled)
        terms = {name for rate in config.rates.values() for name in rate.losses.named()}
        networks = {"alex", "vgg"} & terms
        if "features" in terms:
            networks |= {name for name, _ in FEATURES}
        self.perceptual = PerceptualNetworks(networks)
        self.adversaries = _adversaries(config.adversary, terms)
        self._step = 0
        self.teacher: PatchAutoencoder | None = None
        # Scalars with fixed addresses for recorded steps.
        self._learnt = {name: torch.tensor(math.nan) for name in self.adversaries}

    def start_run(self, place: Place) -> None:
        self.data = self.data.on(place.device)
        self._learnt = {name: value.to(place.device) for name, value in self._learnt.items()}
        for adversary in self.adversaries.values():
            adversary.start_run(place)

    def stored_keys(self) -> set[str]:
        """Return all keys except those of the losses' networks and the teacher."""
        left_out = ("perceptual.", "teacher.")
        return {key for key in self.state_dict() if not key.startswith(left_out)}

    def _rate(self, name: str) -> RateNetworks:
        networks = self.rates[name]
        assert isinstance(networks, RateNetworks)
        return networks

    def start_step(self, step: int, total: int) -> None:
        self._step = step

    @property
    def recordable(self) -> bool:  # type: ignore[override]
        """Return True if every rate has frozen tokens."""
        return all(rate.frozen_tokens for rate in self.config.rates.values())

    def draw(self, generator: np.random.Generator) -> Draw:
        """Draw the crops, words, times, realism, loss weights and view of a step."""
        config = self.config
        name = draw_rate(config.rates, generator)
        rate = config.rates[name]
        images, captions = rate.crops.draw(self.data, generator)
        count, side = len(images), images.shape[-1]
        keep = generator.random(count) >= config.caption_dropout
        captions = [c if k else "" for c, k in zip(captions, keep, strict=True)]
        t = torch.sigmoid(torch.randn(count))
        t = 3 * t / (1 + 2 * t)
        t[: round(config.one_step * count)] = 1.0
        view = draw_view(side, rate.aligned, rate.coarse, config.window)
        weights = rate.losses.at(self._step)
        tensors = {
            "words": self.text_encoder.rows(captions),
            "t": t,
            "realism": config.draw_realism(count),
            "window": view.window,
            "weights": torch.tensor(list(weights.values())),
        }
        if view.shift is not None:
            tensors["shift"] = view.shift
        tensors = {k: v.to(images.device, non_blocking=True) for k, v in tensors.items()}
        kind = name, view.window_side, view.coarse, tuple(weights)
        return Draw(kind, {**tensors, "images": images})

    def compute(self, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        assert isinstance(draw.kind, tuple)
        name, window_side, coarse, active = draw.kind
        networks = self._rate(name)
        tensors = draw.tensors
        images, t, realism = tensors["images"], tensors["t"], tensors["realism"]
        weights = dict(zip(active, tensors["weights"], strict=True))
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
            self._conditioning(self.text_encoder.embed(tensors["words"]), realism),
            config.prediction,
        ).float()
        latent_error = (clean - latents).square().mean()
        level = self._decoder_noise(name)
        if level:
            grain = torch.randn_like(clean) * realism.view(-1, 1, 1, 1)
            clean = clean + level * grain
        clean = clean.contiguous(memory_format=torch.channels_last)
        rebuilt = self.autoencoder.decode(clean)
        view = View(tensors.get("shift"), tensors["window"], window_side, coarse)
        compared = self.perceptual.compare(rebuilt, images, view, frozenset(active))
        loss, figures = weighted(compared, realism, weights)
        if self.teacher is not None:
            with torch.no_grad():
                painted = self.teacher.decode(clean)
            distance = (rebuilt - painted).abs().mean()
            loss = loss + config.distil * distance
            figures["distil"] = distance.detach()
        loss = loss + config.latent_weight * latent_error + config.vq_weight * quantized.loss
        loss = loss - config.spread_weight * quantized.spread
        adversarial = {}
        if "pixels" in weights:
            felt = with_force(rebuilt, weights["pixels"], realism)
            adversarial["pixels"] = self.adversaries["pixels"].loss([felt], [images], realism)
            loss = loss + adversarial["pixels"].mean()
        if "features" in weights:
            found, wanted = compared.found, compared.wanted
            adversarial["features"] = self.adversaries["features"].loss(found, wanted, realism)
            loss = loss + weights["features"] * (realism * adversarial["features"]).mean()
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

    def learn_from(self, teacher: PatchAutoencoder) -> None:
        """Train only the decoder, to imitate another one (``CodecConfig.distil``)."""
        self.requires_grad_(False)
        self.autoencoder.decoder.requires_grad_(True)
        self.teacher = teacher.requires_grad_(False).to(memory_format=torch.channels_last)

    def _decoder_noise(self, rate: str) -> float:
        own = self.config.rates[rate].decoder_noise
        return self.config.decoder_noise if own is None else own

    def _conditioning(self, text: tuple[Tensor, Tensor], realism: Tensor) -> tuple[Tensor, Tensor]:
        """Return the flow's conditioning on captions and realism."""
        return text if self.dial is None else (text[0], text[1] + self.dial(realism))

    def _figures(
        self, rate: str, adversarial: dict[str, Tensor], figures: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the figures of a step, named by rate, with NaN for other rates."""
        missing = torch.tensor(math.nan)
        named = {f"{key}_{name}": missing for name in self.rates for key in figures}
        named.update({f"{key}_{rate}": value for key, value in figures.items()})
        for name in self.adversaries:
            felt = adversarial.get(name)
            named[f"adversarial_{name}"] = missing if felt is None else felt.detach().mean()
            # Discriminators learn after the step, so their losses are from the previous step.
            named[f"discriminator_{name}"] = self._learnt[name].clone()
        return named

    def after_step(self) -> None:
        """Move the codebook of this step's rate, and train the discriminators."""
        for name in self.rates:
            self._rate(name).move_codebook()
        for name, adversary in self.adversaries.items():
            loss = adversary.learn()
            if loss is None:
                self._learnt[name].fill_(math.nan)
            else:
                self._learnt[name].copy_(loss)

    def side_state(self) -> dict[str, Any]:
        return {name: adversary.state_dict() for name, adversary in self.adversaries.items()}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """Restore the discriminators that the run has; others may join late."""
        for name, adversary in self.adversaries.items():
            if name in state:
                adversary.load_state_dict(state[name])

    def reconstruct(self, images: Tensor, captions: list[str], rate: str) -> Tensor:
        """Restore images [B, 3, H, W] in [-1, 1] in one step at realism 1."""
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
            self._conditioning(self.text_encoder(captions), torch.ones(len(latents)).to(latents)),
            self.config.prediction,
        )
        return self.autoencoder.decode(clean + self._decoder_noise(rate) * grain)

    def draw_samples(self, folder: Path, step: int) -> None:
        """Write samples.png: fixed crops above their one-step reconstructions, a row per rate."""
        # The side is a multiple of every rate's tokens.
        unit = max(self._rate(name).token_side for name in self.rates)
        side = max(max(rate.crops.sides) for rate in self.config.rates.values())
        images, captions = self.data.batch(np.random.default_rng(123), 6, side - side % unit)
        rebuilt = [self.reconstruct(images, captions, name) for name in self.rates]
        save_rows(folder / "samples.png", [images, *rebuilt])


def _adversaries(config: AdversaryConfig, terms: set[str]) -> dict[str, Adversary]:
    """Return the discriminators with a weight at any rate."""
    made: dict[str, Adversary] = {}
    if "pixels" in terms:
        made["pixels"] = Adversary(PixelDiscriminator(config.pixel_widths), config.learning_rate)
    if "features" in terms:
        heads = FeatureDiscriminator(FEATURE_CHANNELS, config.feature_width)
        made["features"] = Adversary(heads, config.learning_rate)
    return made
