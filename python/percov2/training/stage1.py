"""The joint phase of stage 1: hyper-encoders, quantizers, flow transformer and decoder.

It follows PerCoV2 §3 (flow matching with z_hat beside the noisy latents). In addition, most samples
start at t = 1 and are decoded. Thus L1 and LPIPS train the whole chain including the decoder. A
small model needs this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.tiny.torch.dial import RealismDial
from percov2.models.tiny.torch.text_encoder import HashedTextEncoder
from percov2.models.torch.flow import build_flow, estimate_clean, upsample_z_hat
from percov2.models.torch.quantizer import Quantized
from percov2.photos import PhotoCrops
from percov2.training import adversary, losses
from percov2.training.adversary import Adversary, AdversaryConfig
from percov2.training.autoencoder_stage import save_rows
from percov2.training.losses import View, draw_view
from percov2.training.rates import RateConfig, RateNetworks, build_rates, draw_rate
from percov2.training.settings import constructed
from percov2.training.stage import Draw, Figures, Place, TrainingStage

__all__ = ["CodecConfig", "CodecStage"]


@dataclass
class CodecConfig:
    """The configuration of the joint phase."""

    rates: dict[str, RateConfig] = field(default_factory=dict)  # in the order of a model folder
    flow: dict = field(default_factory=dict)
    text_encoder: dict = field(default_factory=dict)
    prediction: str = "sample"
    one_step: float = 0.75  # share of samples at t = 1; others draw t as SD3 does (logit-normal)
    decoder_noise: float = 0.0  # std of noise on decoded latents, times realism; rates may differ
    dial: dict | None = None  # sizes of the realism dial; None trains without it, at realism 1
    realism_ends: tuple[float, float] = (0.15, 0.45)  # shares at 0 and 1; others are uniform
    window: int = 96  # largest side in pixels for VGG16 (``losses.draw_view``)
    latent_weight: float = 0.25
    vq_weight: float = 0.25
    spread_weight: float = 0.05
    # Weight of the mean absolute difference to the pictures of the starting model's decoder. If it
    # is above 0, only the decoder learns.
    distil: float = 0.0
    caption_dropout: float = 0.1  # share of captions replaced by "" (PerCo: 10 %)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)

    def __post_init__(self) -> None:
        zero, one = self.realism_ends
        if not (zero >= 0 and one >= 0 and zero + one <= 1):
            wanted = "realism_ends must be two shares with a sum of at most 1"
            raise ValueError(f"{wanted}, not {self.realism_ends}")

    def draw_realism(self, count: int) -> Tensor:
        """Draw the realism β of ``count`` samples, float [count]."""
        if self.dial is None:
            return torch.ones(count)
        zero, one = self.realism_ends
        between = max(1 - zero - one, 1e-6)
        return ((torch.rand(count) - zero) / between).clamp(0, 1)


class CodecStage(TrainingStage):
    """Phase B: joint training with a frozen encoder. Every step draws one rate by its share."""

    frozen_parts = ("perceptual.", "teacher.")

    def __init__(
        self, config: CodecConfig, autoencoder: PatchAutoencoder, data: PhotoCrops
    ) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = autoencoder
        self.autoencoder.encoder.requires_grad_(False)
        self.rates = build_rates(config.rates)
        channels = int(self._rate(next(iter(self.rates))).quantizer.config["output_channels"])
        self.flow = constructed(build_flow, "flow", config.flow, extra_channels=channels)
        self.flow.pos_embed.proj.reset_parameters()
        self.text_encoder = constructed(HashedTextEncoder, "text_encoder", config.text_encoder)
        self.autoencoder.to(memory_format=torch.channels_last)
        pooled = int(self.flow.config["pooled_projection_dim"])
        self.dial: RealismDial | None = None
        if config.dial is not None:
            self.dial = constructed(RealismDial, "dial", config.dial, pooled=pooled)
        terms = {name for rate in config.rates.values() for name in rate.losses.named()}
        networks = {"alex", "vgg"} & terms
        if "features" in terms:
            networks |= {name for name, _ in losses.FEATURES}
        self.perceptual = losses.PerceptualNetworks(networks)
        self.adversaries: dict[str, Adversary] = {}
        judges = config.adversary
        if "pixels" in terms:
            patches = adversary.PixelDiscriminator(judges.pixel_widths)
            self.adversaries["pixels"] = Adversary(patches, judges.learning_rate)
        if "features" in terms:
            width = judges.feature_width
            heads = adversary.FeatureDiscriminator(losses.FEATURE_CHANNELS, width)
            self.adversaries["features"] = Adversary(heads, judges.learning_rate)
        self.teacher: PatchAutoencoder | None = None
        # Scalars with fixed addresses for recorded steps.
        self._learnt = {name: torch.tensor(math.nan) for name in self.adversaries}

    def start_run(self, place: Place) -> None:
        super().start_run(place)
        self.data = self.data.on(place.device)
        self._learnt = {name: value.to(place.device) for name, value in self._learnt.items()}
        for judge in self.adversaries.values():
            judge.start_run(place)

    def _rate(self, name: str) -> RateNetworks:
        networks = self.rates[name]
        assert isinstance(networks, RateNetworks)
        return networks

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
        count = len(images)
        keep = generator.random(count) >= config.caption_dropout
        captions = [c if k else "" for c, k in zip(captions, keep, strict=True)]
        t = torch.sigmoid(torch.randn(count))
        t = 3 * t / (1 + 2 * t)
        t[: round(config.one_step * count)] = 1.0
        view = draw_view(images.shape[-1], rate.aligned, rate.coarse, config.window)
        weights = rate.losses.at(self.step)
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

    def compute(self, draw: Draw) -> tuple[Tensor, Figures]:
        config, tensors = self.config, draw.tensors
        assert isinstance(draw.kind, tuple)
        name, window_side, coarse, active = draw.kind
        networks = self._rate(name)
        images, t, realism = tensors["images"], tensors["t"], tensors["realism"]
        weights = dict(zip(active, tensors["weights"], strict=True))
        with torch.no_grad():
            latents = self.autoencoder.encode(images).float()
        quantized: Quantized = networks(latents)
        noise, mix = torch.randn_like(latents), t.view(-1, 1, 1, 1)
        text = self._conditioning(self.text_encoder.embed(tensors["words"]), realism)
        clean = self._clean((1 - mix) * latents + mix * noise, quantized.z_hat, t, text).float()
        latent_error = (clean - latents).square().mean()
        if level := self._decoder_noise(name):
            clean = clean + level * (torch.randn_like(clean) * realism.view(-1, 1, 1, 1))
        clean = clean.contiguous(memory_format=torch.channels_last)
        rebuilt = self.autoencoder.decode(clean)
        view = View(tensors.get("shift"), tensors["window"], window_side, coarse)
        compared = self.perceptual.compare(rebuilt, images, view, frozenset(active))
        loss, figures = losses.weighted(compared, realism, weights)
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
            felt = adversary.with_force(rebuilt, weights["pixels"], realism)
            adversarial["pixels"] = self.adversaries["pixels"].loss([felt], [images], realism)
            loss = loss + adversarial["pixels"].mean()
        if "features" in weights:
            found, wanted = compared.found, compared.wanted
            adversarial["features"] = self.adversaries["features"].loss(found, wanted, realism)
            loss = loss + weights["features"] * (realism * adversarial["features"]).mean()
        figures["latent"], figures["vq"] = latent_error.detach(), quantized.loss.detach()
        figures["spread"], figures["codes"] = quantized.spread.detach(), networks.codes_in_use()
        # Figures are named by rate, with NaN for other rates.
        missing = torch.tensor(math.nan)
        named = {f"{key}_{rate}": missing for rate in self.rates for key in figures}
        named.update({f"{key}_{name}": value for key, value in figures.items()})
        for judge, learnt in self._learnt.items():
            felt = adversarial.get(judge, missing)
            named[f"adversarial_{judge}"] = felt.detach().mean()
            # Discriminators learn after the step, so their losses are from the previous step.
            named[f"discriminator_{judge}"] = learnt.clone()
        return loss, named

    def learn_from(self, teacher: PatchAutoencoder) -> None:
        """Train only the decoder, so that it imitates the teacher's (``CodecConfig.distil``)."""
        self.requires_grad_(False)
        self.autoencoder.decoder.requires_grad_(True)
        self.teacher = teacher.requires_grad_(False).to(memory_format=torch.channels_last)

    def _decoder_noise(self, rate: str) -> float:
        own = self.config.rates[rate].decoder_noise
        return self.config.decoder_noise if own is None else own

    def _conditioning(self, text: tuple[Tensor, Tensor], realism: Tensor) -> tuple[Tensor, Tensor]:
        """Return the conditioning of the flow on captions and realism."""
        return text if self.dial is None else (text[0], text[1] + self.dial(realism))

    def _clean(
        self, noisy: Tensor, z_hat: Tensor, t: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        above = upsample_z_hat(z_hat, *noisy.shape[-2:])
        return estimate_clean(self.flow, noisy, above, t, text, self.config.prediction)

    def after_step(self) -> None:
        """Move the codebook of this step's rate, and train the discriminators."""
        for name in self.rates:
            self._rate(name).move_codebook()
        for name, judge in self.adversaries.items():
            loss = judge.learn()
            if loss is None:
                self._learnt[name].fill_(math.nan)
            else:
                self._learnt[name].copy_(loss)

    def side_state(self) -> dict[str, Any]:
        return {name: judge.state_dict() for name, judge in self.adversaries.items()}

    def load_side_state(self, state: dict[str, Any]) -> None:
        """Restore the discriminators that the run has. Other discriminators may start later."""
        for name in self.adversaries.keys() & state.keys():
            self.adversaries[name].load_state_dict(state[name])

    def reconstruct(self, images: Tensor, captions: list[str], rate: str) -> Tensor:
        """Restore images [B, 3, H, W] in [-1, 1] in one step at realism 1."""
        networks = self._rate(rate)
        latents = self.autoencoder.encode(images).float()
        generator = torch.Generator().manual_seed(0)
        noise, grain = torch.randn(2, *latents.shape, generator=generator).to(latents)
        z_hat = networks.quantizer.lookup(networks.tokens(latents))
        one = torch.ones(len(latents), device=latents.device)
        text = self._conditioning(self.text_encoder(captions), one)
        clean = self._clean(noise, z_hat, one, text)
        return self.autoencoder.decode(clean + self._decoder_noise(rate) * grain)

    def draw_samples(self, folder: Path, step: int) -> None:
        """Write samples.png: fixed crops, and below them one row of reconstructions per rate."""
        # The side is a multiple of every rate's tokens.
        unit = max(self._rate(name).token_side for name in self.rates)
        side = max(max(rate.crops.sides) for rate in self.config.rates.values())
        images, captions = self.data.batch(np.random.default_rng(123), 6, side - side % unit)
        rebuilt = [self.reconstruct(images, captions, name) for name in self.rates]
        save_rows(folder / "samples.png", [images, *rebuilt])
