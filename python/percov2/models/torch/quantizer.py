"""Vector quantizer with cosine similarity (ViT-VQGAN, arXiv 2110.04627), as PerCo uses it.

Hyper-latents are projected to a few dimensions, normalised to unit length and replaced by the
nearest codebook vector. The vector is projected back for the flow transformer.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from percov2.models.config import Rate
from percov2.models.torch.storage import load_component

__all__ = ["Quantized", "VectorQuantizer", "load_quantizer"]


class Quantized(NamedTuple):
    """The results of :meth:`VectorQuantizer.forward`.

    ``spread`` is the entropy in nats of the batch's soft code usage, at most log V. Training raises
    it; otherwise a quantizer would use only a few codes.
    """

    z_hat: Tensor  # float [B, C, h, w], differentiable by straight-through
    tokens: Tensor  # int32 [B, h, w]
    loss: Tensor  # scalar commitment loss
    spread: Tensor
    directions: Tensor  # float [B·h·w, D], unit vectors before quantization (detached)


class VectorQuantizer(ModelMixin, ConfigMixin):
    """A codebook of V unit vectors of D dimensions, learnt by moving averages.

    It maps M channels of hyper-latents to C channels of z_hat for the flow transformer.
    """

    codebook: Tensor
    usage: Tensor

    @register_to_config
    def __init__(
        self,
        hyper_channels: int = 320,  # M
        codebook_size: int = 256,  # V
        code_dim: int = 32,  # D
        output_channels: int = 320,  # C
    ) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(hyper_channels, code_dim, 1)
        self.project_out = nn.Conv2d(code_dim, output_channels, 1)
        self.register_buffer("codebook", F.normalize(torch.randn(codebook_size, code_dim), dim=1))
        self.register_buffer("usage", torch.zeros(codebook_size))

    def tokens(self, hyper_latents: Tensor) -> Tensor:
        """Return the token int32 [B, h, w] of each hyper-latent; the lowest index wins a tie."""
        return self.nearest(self.directions(hyper_latents))

    def directions(self, hyper_latents: Tensor) -> Tensor:
        """Return unit vectors float32 [B, h, w, D] of hyper-latents [B, M, h, w]."""
        projected = self.project_in(hyper_latents).permute(0, 2, 3, 1)
        return F.normalize(projected.float(), dim=-1)

    def nearest(self, directions: Tensor) -> Tensor:
        """Return the token int32 [B, h, w] of each direction; the lowest index wins a tie."""
        return (directions @ self.codebook.float().T).argmax(-1).to(torch.int32)

    def candidates(self, directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return tokens int32 and cosine similarities float32 of the nearest codes, nearest first.

        Both are [B, h, w, min(count, V)].
        """
        similarities = directions @ self.codebook.float().T
        best = similarities.topk(min(count, similarities.shape[-1]), -1)
        return best.indices.to(torch.int32), best.values

    def lookup(self, tokens: Tensor) -> Tensor:
        """Return z_hat float [B, C, h, w] of tokens int [B, h, w]; ValueError outside 0 … V − 1."""
        size = self.codebook.shape[0]
        if tokens.numel() and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
            raise ValueError(f"tokens must lie in 0…{size - 1}")
        return self.embed(tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return z_hat as :meth:`lookup` does, without a check that would wait for a GPU."""
        return self._project(self.codebook[tokens.long()])

    def straight_through(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_hat [B, C, h, w] of the nearest codes, and the codes [B, h, w, D].

        The gradient of z_hat reaches the directions as if they were not quantized.
        """
        codes = self.codebook[self.nearest(directions).long()]
        return self._project(directions + (codes - directions).detach()), codes

    def forward(self, hyper_latents: Tensor) -> Quantized:
        """Quantize with straight-through gradients (training)."""
        directions = self.directions(hyper_latents)
        tokens = self.nearest(directions)
        z_hat, codes = self.straight_through(directions)
        loss = (directions - codes).square().sum(-1).mean()
        usage = (directions.flatten(0, 2) @ self.codebook.T * 10).softmax(-1).mean(0)
        spread = -(usage * usage.clamp_min(1e-9).log()).sum()
        return Quantized(z_hat, tokens, loss, spread, directions.detach().flatten(0, 2))

    @torch.no_grad()
    def update_codebook(self, directions: Tensor, tokens: Tensor, decay: float = 0.97) -> None:
        """Move each code toward its members, and restart rarely used codes (training).

        A random direction of this step replaces a code whose average count per step is below a
        tenth of the uniform count.

        Args:
            directions, tokens: unit vectors of this step, float [N, D], and their codes, int [N].
            decay: moving-average factor.
        """
        size = self.codebook.shape[0]
        directions, members = directions.float(), tokens.flatten().long()
        counts = torch.bincount(members, minlength=size).float()
        sums = torch.zeros_like(self.codebook).index_add_(0, members, directions)
        self.usage.mul_(decay).add_(counts, alpha=1 - decay)
        step = ((1 - decay) * counts / self.usage.clamp_min(1e-6)).clamp_max(1.0)[:, None]
        means = sums / counts.clamp_min(1)[:, None]
        self.codebook.copy_(F.normalize(self.codebook * (1 - step) + means * step, dim=1))
        uniform = directions.shape[0] / size
        dead = (self.usage < 0.1 * uniform).nonzero().flatten()
        if len(dead):
            picks = torch.randint(directions.shape[0], (len(dead),))
            self.codebook[dead] = directions[picks]
            self.usage[dead] = uniform

    def _project(self, codes: Tensor) -> Tensor:
        codes = codes.permute(0, 3, 1, 2) * self.codebook.shape[1] ** 0.5
        return self.project_out(codes.to(self.project_out.weight.dtype))


def load_quantizer(folder: Path, rate: Rate, device: str = "cpu") -> VectorQuantizer:
    """Load the quantizer of a rate; ValueError if damaged or with a codebook of another size."""
    model = load_component(VectorQuantizer, folder, device)
    size = len(model.codebook)
    if size != rate.codebook_size:
        raise ValueError(
            f"{folder} has a codebook of {size}, but rate {rate.name} one of "
            f"{rate.codebook_size}: config.json or the folder belongs to another model"
        )
    return model
