"""PerCo (SD v2.1)'s hyper-encoder and quantizer, from the published layer list, on plain tensors.

Written from the facts in docs/reference/perco.md under the published state-dict names, with
functions instead of modules, and independent of percov2. The oracle of
tests/models/test_perco_weights.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRIDS = {64: 1, 32: 2, 16: 4, 8: 8}
"""Tokens per side of a 512×512 picture -> latent positions per token side."""


def strided(grid: int) -> list[bool]:
    """Whether the three convolutions at places 0, 4 and 9 halve the grid (5×5) or not (1×1)."""
    return [grid < 16, grid < 32, grid < 64]


def shapes(grid: int, n: int, m: int, codes: int, dim: int, latents: int = 4) -> dict[str, tuple]:
    """Names and shapes of a published ``hyper_enc`` state dict."""
    found: dict[str, tuple] = {}

    def layer(name: str, out: int, inputs: int, side: int = 1) -> None:
        found[f"{name}.weight"] = (out, inputs, side, side)
        found[f"{name}.bias"] = (out,)

    def residual(name: str, channels: int) -> None:
        layer(f"{name}.0", channels // 2, channels)
        layer(f"{name}.2", channels // 2, channels // 2, 3)
        layer(f"{name}.4", channels, channels // 2)

    for place, inputs, halve in zip((0, 4, 9), (latents, n, n), strided(grid), strict=True):
        layer(f"backbone.{place}", n, inputs, 5 if halve else 1)
    for place in (1, 2, 3, 5, 6, 7, 10, 11, 12):
        residual(f"backbone.{place}.layers", n)
    layer("backbone.13", m, n)
    for place, channels in ((8, n), (14, m)):
        for unit in range(3):
            residual(f"backbone.{place}.conv_a.{unit}.conv", channels)
            residual(f"backbone.{place}.conv_b.{unit}.conv", channels)
        layer(f"backbone.{place}.conv_b.3", channels, channels)
    found["quantizer.project_in.weight"] = (dim, m)
    found["quantizer.project_in.bias"] = (dim,)
    found["quantizer.project_out.weight"] = (m, dim)
    found["quantizer.project_out.bias"] = (m,)
    found["quantizer._codebook.initted"] = (1,)
    found["quantizer._codebook.cluster_size"] = (1, codes)
    found["quantizer._codebook.embed_avg"] = (1, codes, dim)
    found["quantizer._codebook.embed"] = (1, codes, dim)
    return found


def random_state(grid: int, n: int, m: int, codes: int, dim: int, seed: int) -> dict[str, Tensor]:
    """A random state dict of those shapes whose activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(grid, n, m, codes, dim).items():
        value = torch.randn(shape, generator=generator)
        inputs = value[0].numel() if value.ndim > 1 else 1
        state[name] = value * 0.1 if name.endswith("bias") else value * (1.5 / inputs) ** 0.5
    state["quantizer._codebook.embed"] = F.normalize(state["quantizer._codebook.embed"], dim=-1)
    state["quantizer._codebook.cluster_size"] = state["quantizer._codebook.cluster_size"].abs()
    state["quantizer._codebook.initted"] = torch.ones(1)
    return state


def hyper_latents(state: dict[str, Tensor], latents: Tensor, grid: int) -> Tensor:
    """[B, M, h, w] of latents [B, 4, ...]."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def residual(name: str, x: Tensor) -> Tensor:
        inner = F.relu(conv(f"{name}.0", x))
        inner = F.relu(conv(f"{name}.2", inner))
        return x + conv(f"{name}.4", inner)

    def attention(name: str, x: Tensor) -> Tensor:
        a, b = x, x
        for unit in range(3):
            a = F.relu(residual(f"{name}.conv_a.{unit}.conv", a))
            b = F.relu(residual(f"{name}.conv_b.{unit}.conv", b))
        return x + a * torch.sigmoid(conv(f"{name}.conv_b.3", b))

    first, second, third = (2 if halve else 1 for halve in strided(grid))
    x = conv("backbone.0", latents, first)
    for place in (1, 2, 3):
        x = residual(f"backbone.{place}.layers", x)
    x = conv("backbone.4", x, second)
    for place in (5, 6, 7):
        x = residual(f"backbone.{place}.layers", x)
    x = attention("backbone.8", x)
    x = conv("backbone.9", x, third)
    for place in (10, 11, 12):
        x = residual(f"backbone.{place}.layers", x)
    return attention("backbone.14", conv("backbone.13", x))


def quantize(state: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, h, w] and z_hat [B, M, h, w] of hyper-latents [B, M, h, w]."""
    batch, _, height, width = z.shape
    vectors = z.permute(0, 2, 3, 1).reshape(batch * height * width, -1)
    weight, bias = state["quantizer.project_in.weight"], state["quantizer.project_in.bias"]
    directions = F.normalize(vectors @ weight.T + bias, dim=1)
    codes = state["quantizer._codebook.embed"][0]
    indices = torch.stack([(codes - d).square().sum(1).argmin() for d in directions])
    weight, bias = state["quantizer.project_out.weight"], state["quantizer.project_out.bias"]
    z_hat = codes[indices] @ weight.T + bias
    return (
        indices.view(batch, height, width),
        z_hat.view(batch, height, width, -1).permute(0, 3, 1, 2),
    )
