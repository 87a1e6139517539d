"""The realism dial: β in [0, 1] as a part of the flow's pooled conditioning.

0 gives a faithful picture, 1 a realistic one (Multi-Realism Image Compression, Agustsson et al.
2023, arXiv 2212.13824; CRDR, Iwai et al. 2024, arXiv 2306.01150).
"""

from __future__ import annotations

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

__all__ = ["RealismDial"]


class RealismDial(ModelMixin, ConfigMixin):
    """A network from β to an offset of the caption's pooled embedding.

    Sinusoids of β pass two layers. The last one starts at zero, so a new dial does not change a
    model before training.

    There are ``frequencies`` sinusoid pairs, of π/2, π, 2π, …; a few keep the picture smooth in β.
    ``width`` and ``pooled`` are the channels of the hidden layer and of the pooled embedding.
    """

    @register_to_config
    def __init__(self, frequencies: int = 4, width: int = 64, pooled: int = 64) -> None:
        super().__init__()
        first, last = nn.Linear(2 * frequencies, width), nn.Linear(width, pooled)
        self.layers = nn.Sequential(first, nn.SiLU(), last)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, realism: Tensor) -> Tensor:
        """Return offsets float [B, pooled] of β, float [B] in [0, 1]."""
        count = int(self.config["frequencies"])
        steps = torch.arange(count, device=realism.device, dtype=realism.dtype)
        angles = realism[:, None] * (math.pi / 2) * 2**steps
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))
