"""The rates in training. Each has its own tokens; they share autoencoder, flow and text encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from percov2.models.config import Rate
from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.models.torch.hyper_encoder import HyperEncoder
from percov2.models.torch.quantizer import Quantized, VectorQuantizer
from percov2.photos import CropPlan
from percov2.training.losses import LossTerms, least_side
from percov2.training.settings import constructed

__all__ = ["RateConfig", "RateNetworks", "build_rates", "draw_rate", "perplexity"]

_PATCH_PIXELS = 2 * PatchAutoencoder.stride
"""Side in pixels of the flow's patches; training does not pad crops."""


@dataclass(frozen=True)
class RateConfig:
    """The settings of one rate.

    Raises:
        ValueError: ``aligned`` or ``coarse`` is outside 0 to 1, or crops are too small for LPIPS.
    """

    hyper_encoder: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    crops: CropPlan = field(default_factory=CropPlan)  # sides are multiples of the token side
    share: float = 1.0  # relative share of the training steps; shares need not sum to 1
    # Decay of the codebook's moving averages. It should be nearer to 1 if a step has few tokens per
    # code. With 1, the hyper-encoder learns, but the codebook and the model id stay.
    codebook_decay: float = 0.97
    # Freeze the hyper-encoder and the codebook, so that files and entropy models stay valid while
    # the flow and the decoder improve.
    frozen_tokens: bool = False
    losses: LossTerms = field(default_factory=LossTerms)
    aligned: float = 0.0  # share of batches with LPIPS (AlexNet) aligned to tokens (``View``)
    coarse: float = 0.0  # share of batches in which LPIPS (AlexNet) sees pictures of half the size
    # Defaults for decoding at this rate. None means the model's default.
    steps: int | None = None
    realism: float | None = None
    decoder_noise: float | None = None

    def __post_init__(self) -> None:
        for name in ("aligned", "coarse"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, not {getattr(self, name)}")
        least = least_side(self.coarse > 0)
        if min(self.crops.sides) < least:
            small = f"crops of {min(self.crops.sides)} pixels are too small for LPIPS"
            raise ValueError(f"{small}; sides must be at least {least} pixels")


def perplexity(usage: Tensor) -> Tensor:
    """Return exp(entropy) of the code counts [V]. It is V if all counts are equal."""
    share = usage / usage.sum().clamp_min(1e-9)
    return (-(share * share.clamp_min(1e-9).log()).sum()).exp()


class RateNetworks(nn.Module):
    """The hyper-encoder and the quantizer of one rate.

    Args:
        config: settings of the rate. With frozen tokens, only the projection from codes to z_hat
            learns, on which files do not depend.

    Raises:
        ValueError: a crop side is not a multiple of the token side and of the flow's patches.
    """

    def __init__(self, config: RateConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.hyper_encoder
        self.hyper_encoder = constructed(HyperEncoder, "hyper_encoder", sizes)
        self.hyper_encoder.to(memory_format=torch.channels_last)
        self.quantizer = constructed(VectorQuantizer, "quantizer", config.quantizer)
        unit = max(self.token_side, _PATCH_PIXELS)
        if odd := [side for side in config.crops.sides if side % unit]:
            raise ValueError(
                f"crop sides {odd} are not multiples of {unit} pixels, the larger of this rate's "
                "token side and the side of the flow's patches"
            )
        self._last: Quantized | None = None
        if config.frozen_tokens:
            self.requires_grad_(False)
            self.quantizer.project_out.requires_grad_(True)

    @property
    def token_side(self) -> int:
        """Return the side of a token in pixels."""
        return PatchAutoencoder.stride * int(self.hyper_encoder.config["stride"])

    def point(self, name: str) -> Rate:
        """Return the rate for the configuration of a model folder."""
        size, own = int(self.quantizer.config["codebook_size"]), self.config
        return Rate(name, self.token_side, size, own.steps, own.realism, own.decoder_noise)

    def forward(self, latents: Tensor) -> Quantized:
        """Quantize latents [B, 16, h, w] differentiably. Keep the result for ``move_codebook``.

        With frozen tokens, both losses are 0 and nothing is kept.
        """
        if self.config.frozen_tokens:
            tokens, no_loss = self.tokens(latents), latents.new_zeros(())
            z_hat, no_directions = self.quantizer.embed(tokens), latents.new_zeros(0)
            return Quantized(z_hat, tokens, no_loss, no_loss, no_directions)
        quantized = self._last = self.quantizer(self.hyper_encoder(latents))
        return quantized

    @torch.no_grad()
    def tokens(self, latents: Tensor) -> Tensor:
        """Return the tokens, int32 [B, h', w'], of latents."""
        return self.quantizer.tokens(self.hyper_encoder(latents))

    def move_codebook(self) -> None:
        """Move the codes once towards the hyper-latents of the last step."""
        if self._last is not None and self.config.codebook_decay < 1:
            directions, tokens = self._last.directions, self._last.tokens
            self.quantizer.update_codebook(directions, tokens, decay=self.config.codebook_decay)
            self._last = None

    def codes_in_use(self) -> Tensor:
        """Return the perplexity of the recent code usage."""
        return perplexity(self.quantizer.usage)


def build_rates(configs: dict[str, RateConfig]) -> nn.ModuleDict:
    """Return the networks of every rate, in the order of the rates in a model folder.

    Raises:
        ValueError: there is no rate, a share is not positive, crops do not match the tokens, or the
            rates have different numbers of channels in z_hat.
    """
    if not configs:
        raise ValueError("give at least one rate, e.g. a table [codec.rates.r031]")
    if bad := {name: c.share for name, c in configs.items() if not c.share > 0}:
        raise ValueError(f"shares of the steps must be positive, not {bad}")
    rates = {name: RateNetworks(config) for name, config in configs.items()}
    channels = {n: int(r.quantizer.config["output_channels"]) for n, r in rates.items()}
    if len(set(channels.values())) > 1:
        raise ValueError(f"output_channels of all quantizers must be equal, not {channels}")
    return nn.ModuleDict(rates)


def draw_rate(configs: dict[str, RateConfig], generator: np.random.Generator) -> str:
    """Draw the rate of a step. If there is only one rate, return it without a draw."""
    names = list(configs)
    if len(names) == 1:
        return names[0]
    shares = np.array([configs[name].share for name in names])
    return names[int(generator.choice(len(names), p=shares / shares.sum()))]
