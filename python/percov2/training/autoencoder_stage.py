"""The autoencoder phase of stage 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from percov2.models.tiny.torch.autoencoder import PatchAutoencoder
from percov2.photos import CropPlan, PhotoCrops
from percov2.training.losses import LossTerms, PerceptualNetworks, Term, draw_view, weighted
from percov2.training.settings import constructed
from percov2.training.stage import Figures, Place, TrainingStage

__all__ = ["AutoencoderConfig", "AutoencoderStage", "save_rows"]


def save_rows(path: Path, rows: list[Tensor]) -> None:
    """Write rows of images, each float [B, 3, H, W] in [-1, 1], as one PNG file."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    levels = grid.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(levels.contiguous().cpu().numpy()).save(path)


@dataclass
class AutoencoderConfig:
    """The configuration of the autoencoder phase."""

    autoencoder: dict = field(default_factory=dict)
    crops: CropPlan = field(default_factory=CropPlan)
    losses: LossTerms = field(default_factory=lambda: LossTerms(alex=Term(0.5)))
    latent_noise: float = 0.1


class AutoencoderStage(TrainingStage):
    """Phase A: an autoencoder whose latents stay near unit variance."""

    frozen_parts = ("perceptual.",)

    def __init__(self, config: AutoencoderConfig, data: PhotoCrops) -> None:
        super().__init__()
        self.config, self.data = config, data
        self.autoencoder = constructed(PatchAutoencoder, "autoencoder", config.autoencoder)
        self.autoencoder.to(memory_format=torch.channels_last)
        self.perceptual = PerceptualNetworks({"alex", "vgg"} & set(config.losses.named()))

    def start_run(self, place: Place) -> None:
        super().start_run(place)
        self.data = self.data.on(place.device)

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, Figures]:
        images, _ = self.config.crops.draw(self.data, generator)
        latents = self.autoencoder.encode(images).float()
        noisy = latents + self.config.latent_noise * torch.randn_like(latents)
        rebuilt, side = self.autoencoder.decode(noisy), images.shape[-1]
        weights = {k: torch.tensor(v) for k, v in self.config.losses.at(self.step).items()}
        view = draw_view(side, 0.0, 0.0, side)
        compared = self.perceptual.compare(rebuilt, images, view, frozenset(weights))
        realism = torch.ones(len(images), device=images.device)
        loss, figures = weighted(compared, realism, weights)
        power = latents.square().mean((0, 2, 3))
        spread = ((power - 1).square() + latents.mean((0, 2, 3)).square()).mean()
        return loss + 0.02 * spread, {**figures, "power": power.mean().detach()}

    def draw_samples(self, folder: Path, step: int) -> None:
        """Write samples.png: fixed crops above their reconstructions."""
        images, _ = self.data.batch(np.random.default_rng(123), 6, self.config.crops.sides[0])
        rebuilt = self.autoencoder.decode(self.autoencoder.encode(images))
        save_rows(folder / "samples.png", [images, rebuilt])
